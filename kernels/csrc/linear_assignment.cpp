// Linear assignment by shortest augmenting paths with dual variables (Jonker and Volgenant 1987, in the rectangular
// form of Crouse, "On implementing 2D rectangular assignment algorithms", 2016): O(rows^2 * columns) per problem.
//
// Rows are added one at a time. For a new row a Dijkstra search over reduced costs finds the nearest free column, passing
// through columns that are taken and the rows that hold them; then the path is flipped and the duals move.
//
// Ties. Columns not yet reached are in a list that starts with the highest index; the list's last entry replaces a
// reached column. Of several columns at the same distance a free one wins over a taken one; of free ones the last in the
// list wins (a constant cost gives row i column i), of taken ones the first. scipy.optimize.linear_sum_assignment has the
// same order, so results do not depend on whether this library could be built.

#include "sizes.h"
#include "spot_native.h"
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <limits>
#include <utility>
#include <vector>

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLargestCost = 1e300;
constexpr int64_t kNone = -1;

// Estimates that decide how many threads pay: ns of a core for each cost of a problem, and of work done in a row with the
// same buffers.
constexpr double kNsPerCost = 20.0, kBlockNs = 1e5;

// Problems with rows <= columns, of `most` costs and `longest` columns at most; the buffers serve one after the other.
class Solver {
  public:
    Solver(int64_t most, int64_t longest)
        : cost(most), column_of(longest), row_dual_(longest), column_dual_(longest), distance_(longest), row_of_(longest),
          came_from_(longest), unreached_(longest) {
        searched_rows_.reserve(longest);
        reached_columns_.reserve(longest);
    }

    std::vector<double> cost;        // [rows, columns], in
    std::vector<int64_t> column_of;  // [rows], out

    void solve(int64_t rows, int64_t columns) {
        columns_ = columns;
        std::fill_n(row_dual_.begin(), rows, 0.0);
        std::fill_n(column_dual_.begin(), columns, 0.0);
        std::fill_n(row_of_.begin(), columns, kNone);
        std::fill_n(column_of.begin(), rows, kNone);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t sink = search(row);
            move_duals(row, distance_[sink]);
            flip_path(row, sink);
        }
    }

  private:
    // Nearest free column from `start`. One exists: fewer rows than columns hold a column, and distances are finite.
    int64_t search(int64_t start) {
        searched_rows_.clear();
        reached_columns_.clear();
        for (int64_t i = 0; i < columns_; ++i) {
            const int64_t column = columns_ - 1 - i;
            unreached_[i] = {kInfinity, column_dual_[column], column, start};
        }
        double walked = 0.0;
        int64_t row = start;
        for (int64_t left = columns_;; --left) {
            searched_rows_.push_back(row);
            const double* row_cost = cost.data() + row * columns_;
            const double dual = row_dual_[row];
            double lowest = kInfinity;
            // shorten the distances through the row that was reached, and find the shortest of all
            for (int64_t i = 0; i < left; ++i) {
                Unreached& u = unreached_[i];
                // in scipy's order of operations, because rounding decides near-ties
                const double through_row = walked + row_cost[u.column] - dual - u.dual;
                // selects instead of branches, which the processor could not predict
                const bool shorter = through_row < u.distance;
                const double distance = shorter ? through_row : u.distance;
                u.distance = distance;
                u.came_from = shorter ? row : u.came_from;
                lowest = distance < lowest ? distance : lowest;
            }
            int64_t nearest = kNone;  // index in the list: the last free column at that distance, or the first taken one
            for (int64_t i = 0; i < left; ++i) {
                if (unreached_[i].distance == lowest) {
                    const bool also_free = row_of_[unreached_[i].column] == kNone;
                    nearest = nearest == kNone || also_free ? i : nearest;
                }
            }
            const Unreached reached = unreached_[nearest];
            unreached_[nearest] = unreached_[left - 1];
            const int64_t column = reached.column;
            distance_[column] = walked = lowest;
            came_from_[column] = reached.came_from;
            reached_columns_.push_back(column);
            if (row_of_[column] == kNone) {
                return column;
            }
            row = row_of_[column];
        }
    }

    // Keeps reduced costs non-negative, and zero on the assigned pairs, for a path of length `walked` from `start`.
    void move_duals(int64_t start, double walked) {
        for (const int64_t row : searched_rows_) {
            row_dual_[row] += row == start ? walked : walked - distance_[column_of[row]];
        }
        for (const int64_t column : reached_columns_) {
            column_dual_[column] -= walked - distance_[column];
        }
    }

    // Walks back from the free column to the new row and gives every row on the path the column after it.
    void flip_path(int64_t start, int64_t sink) {
        int64_t column = sink;
        int64_t row;
        do {
            row = came_from_[column];
            row_of_[column] = row;
            std::swap(column_of[row], column);
        } while (row != start);
    }

    // A column in the list of the comment on ties, with all that a step reads and writes of it side by side.
    struct Unreached {
        double distance, dual;
        int64_t column, came_from;
    };
    int64_t columns_ = 0;
    std::vector<double> row_dual_, column_dual_;
    std::vector<double> distance_;    // from the new row to each column that was reached
    std::vector<int64_t> row_of_;     // row that holds each column, or kNone
    std::vector<int64_t> came_from_;  // row before each column on its shortest path
    std::vector<Unreached> unreached_;
    std::vector<int64_t> searched_rows_, reached_columns_;
};

template <typename T>
struct Batch {
    const T* cost;
    const int64_t* num_columns;
    int64_t batch, rows, columns;
    int64_t* assignment;
};

// The problem of one image. Returns false for a cost that is not finite or too large.
template <typename T>
bool assign_one(const Batch<T>& all, int64_t image, Solver& solver) {
    const int64_t rows = all.rows, columns = all.num_columns ? all.num_columns[image] : all.columns;
    const T* cost = all.cost + image * rows * all.columns;
    // more rows than columns: solve the transposed problem, whose rows are the columns here
    const bool transposed = rows > columns;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
            const double value = static_cast<double>(cost[r * all.columns + c]);
            if (!(std::fabs(value) <= kLargestCost)) {  // NaN compares as false
                return false;
            }
            solver.cost[transposed ? c * rows + r : r * columns + c] = value;
        }
    }
    solver.solve(std::min(rows, columns), std::max(rows, columns));
    int64_t* assignment = all.assignment + image * rows;
    for (int64_t r = 0; r < rows; ++r) {
        assignment[r] = transposed ? kNone : solver.column_of[r];
    }
    for (int64_t c = 0; transposed && c < columns; ++c) {
        assignment[solver.column_of[c]] = c;
    }
    return true;
}

template <typename T>
int assign_batch(const Batch<T>& all, int32_t threads) {
    const int64_t batch = all.batch, rows = all.rows, columns = all.columns;
    if (batch == 0 && rows >= 0 && columns >= 0) {
        return SPOT_OK;
    }
    if (!spot::countable({batch, rows, columns}) || !spot::present(all.cost, rows * columns) ||
        !spot::present(all.assignment, rows)) {
        return SPOT_BAD_SIZE;
    }
    for (int64_t b = 0; all.num_columns && b < batch; ++b) {
        if (all.num_columns[b] < 0 || all.num_columns[b] > columns) {
            return SPOT_BAD_SIZE;
        }
    }
    // a thread takes several small problems at once, for which it allocates once
    const double nanoseconds = 1.0 + kNsPerCost * static_cast<double>(rows) * static_cast<double>(columns);
    const int64_t block = std::clamp<int64_t>(static_cast<int64_t>(kBlockNs / nanoseconds), 1, batch);
    std::atomic<int> status{SPOT_OK};
    spot::each_image(threads, (batch + block - 1) / block, block * nanoseconds, [&](int64_t i) noexcept {
        try {
            Solver solver(rows * columns, std::max(rows, columns));
            for (int64_t b = i * block; b < std::min(batch, (i + 1) * block); ++b) {
                if (!assign_one(all, b, solver)) {
                    status = SPOT_BAD_COST;
                    return;
                }
            }
        } catch (const std::exception&) {  // bad_alloc, length_error: nothing else here throws
            status = SPOT_NO_MEMORY;
        }
    });
    return status;
}

template <typename T>
int guarded(const Batch<T>& all, int32_t threads) {
    try {
        return assign_batch(all, threads);
    } catch (const std::exception&) {  // bad_alloc of the list of threads
        return SPOT_NO_MEMORY;
    }
}

}  // namespace

int spot_linear_assignment_f32(const float* cost, const int64_t* num_columns, int64_t batch, int64_t rows,
                               int64_t columns, int32_t threads, int64_t* assignment) {
    return guarded(Batch<float>{cost, num_columns, batch, rows, columns, assignment}, threads);
}

int spot_linear_assignment_f64(const double* cost, const int64_t* num_columns, int64_t batch, int64_t rows,
                               int64_t columns, int32_t threads, int64_t* assignment) {
    return guarded(Batch<double>{cost, num_columns, batch, rows, columns, assignment}, threads);
}
