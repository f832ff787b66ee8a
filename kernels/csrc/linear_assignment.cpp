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

#include <cmath>
#include <exception>
#include <limits>
#include <utility>
#include <vector>

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLargestCost = 1e300;
constexpr int64_t kNone = -1;

// One problem with rows <= columns; the buffers serve every problem of a batch.
class Solver {
  public:
    Solver(int64_t rows, int64_t columns)
        : cost(rows * columns), column_of(rows), rows_(rows), columns_(columns), row_dual_(rows), column_dual_(columns),
          distance_(columns), row_of_(columns), came_from_(columns), unreached_(columns) {
        searched_rows_.reserve(rows);
        reached_columns_.reserve(columns);
    }

    std::vector<double> cost;        // [rows, columns], in
    std::vector<int64_t> column_of;  // [rows], out

    void solve() {
        row_dual_.assign(rows_, 0.0);
        column_dual_.assign(columns_, 0.0);
        row_of_.assign(columns_, kNone);
        column_of.assign(rows_, kNone);
        for (int64_t row = 0; row < rows_; ++row) {
            const int64_t sink = search(row);
            move_duals(row, distance_[sink]);
            flip_path(row, sink);
        }
    }

  private:
    // Nearest free column from `start`. One exists: fewer rows than columns hold a column, and distances are finite.
    int64_t search(int64_t start) {
        distance_.assign(columns_, kInfinity);
        searched_rows_.clear();
        reached_columns_.clear();
        for (int64_t i = 0; i < columns_; ++i) {
            unreached_[i] = columns_ - 1 - i;
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
                const int64_t column = unreached_[i];
                // in scipy's order of operations, because rounding decides near-ties
                const double through_row = walked + row_cost[column] - dual - column_dual_[column];
                // selects instead of branches, which the processor could not predict
                const bool shorter = through_row < distance_[column];
                const double distance = shorter ? through_row : distance_[column];
                distance_[column] = distance;
                came_from_[column] = shorter ? row : came_from_[column];
                lowest = distance < lowest ? distance : lowest;
            }
            int64_t nearest = kNone;  // index in the list: the last free column at that distance, or the first taken one
            for (int64_t i = 0; i < left; ++i) {
                if (distance_[unreached_[i]] == lowest) {
                    const bool also_free = row_of_[unreached_[i]] == kNone;
                    nearest = nearest == kNone || also_free ? i : nearest;
                }
            }
            const int64_t column = unreached_[nearest];
            unreached_[nearest] = unreached_[left - 1];
            reached_columns_.push_back(column);
            walked = lowest;
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

    int64_t rows_, columns_;
    std::vector<double> row_dual_, column_dual_;
    std::vector<double> distance_;        // from the new row to each column
    std::vector<int64_t> row_of_;         // row that holds each column, or kNone
    std::vector<int64_t> came_from_;      // row before each column on its shortest path
    std::vector<int64_t> unreached_;      // the list of the comment on ties
    std::vector<int64_t> searched_rows_, reached_columns_;
};

template <typename T>
int assign_batch(const T* cost, int64_t batch, int64_t rows, int64_t columns, int64_t* assignment) {
    if (batch == 0 && rows >= 0 && columns >= 0) {
        return SPOT_OK;
    }
    if (!spot::countable({batch, rows, columns}) || !spot::present(cost, rows * columns) || !spot::present(assignment, rows)) {
        return SPOT_BAD_SIZE;
    }
    // more rows than columns: solve the transposed problem, whose rows are the columns here
    const bool transposed = rows > columns;
    Solver solver(transposed ? columns : rows, transposed ? rows : columns);
    for (int64_t b = 0; b < batch; ++b, cost += rows * columns, assignment += rows) {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < columns; ++c) {
                const double value = static_cast<double>(cost[r * columns + c]);
                if (!(std::fabs(value) <= kLargestCost)) {  // NaN compares as false
                    return SPOT_BAD_COST;
                }
                solver.cost[transposed ? c * rows + r : r * columns + c] = value;
            }
        }
        solver.solve();
        for (int64_t r = 0; r < rows; ++r) {
            assignment[r] = transposed ? kNone : solver.column_of[r];
        }
        for (int64_t c = 0; transposed && c < columns; ++c) {
            assignment[solver.column_of[c]] = c;
        }
    }
    return SPOT_OK;
}

template <typename T>
int guarded(const T* cost, int64_t batch, int64_t rows, int64_t columns, int64_t* assignment) {
    try {
        return assign_batch(cost, batch, rows, columns, assignment);
    } catch (const std::exception&) {  // bad_alloc, length_error: nothing else here throws
        return SPOT_NO_MEMORY;
    }
}

}  // namespace

int spot_linear_assignment_f32(const float* cost, int64_t batch, int64_t rows, int64_t columns, int64_t* assignment) {
    return guarded(cost, batch, rows, columns, assignment);
}

int spot_linear_assignment_f64(const double* cost, int64_t batch, int64_t rows, int64_t columns, int64_t* assignment) {
    return guarded(cost, batch, rows, columns, assignment);
}
