"""Scores of runs as plain JSON; scores are fractions."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from spot_fast import __version__
from spot_fast.evaluation.metrics import METRICS, SIZE_BINS
from spot_fast.evaluation.protocols import Protocol
from spot_fast.evaluation.scoring import Row
from spot_fast.evaluation.tables import ScoredRun, mean_recall, mean_rows, mean_sizes, tables_by_protocol
from spot_fast.evaluation.transfer import transfer_json


def json_results(
    runs: Sequence[ScoredRun], groups: Sequence[Sequence[int]], protocols: Sequence[Protocol], settings: dict
) -> dict:
    """groups: indices of `runs` that differ only in their seed. With --transfer there are none, but its table."""
    transfer = runs and runs[0].data_set
    return {
        "protocol": protocols[0].name,
        "protocols": {protocol.name: {"about": protocol.about, "source": protocol.source} for protocol in protocols},
        "unit": "fraction",
        "versions": {"spot_fast": __version__, "torch": torch.__version__, "python": sys.version.split()[0]},
        "settings": settings,
        "runs": [_run(run) for run in runs],
        "summary": [entry for group in groups for entry in _summary([runs[index] for index in group])],
        **({"transfer": transfer_json(runs, [protocol.name for protocol in protocols])} if transfer else {}),
    }


def _summary(group: Sequence[ScoredRun]) -> list[dict]:
    """An entry for each protocol."""
    return [
        {
            "preset": group[0].config.preset,
            "stage": group[0].config.stage,
            "protocol": tables[0].protocol,
            "runs": [run.name for run in group],
            "rows": [
                {
                    "title": title,
                    **{name: _mean_std(score) for name, score in scores.items()},
                    "average_recall": {name: _mean_std(score) for name, score in recall.items()},
                    "sizes": [_size_bin(index, mbo_i=_mean_std(cell)) for index, cell in enumerate(cells)],
                }
                for (title, scores), (_, recall), (_, cells) in zip(
                    mean_rows(tables), mean_recall(tables), mean_sizes(tables), strict=True
                )
            ],
        }
        for tables in tables_by_protocol(group)
    ]


def _mean_std(score: tuple[float, float] | None) -> dict[str, float] | None:
    return score and dict(zip(("mean", "std"), score, strict=True))


def _size_bin(index: int, **values: object) -> dict:
    """Values of instances larger than "above", at most "to", fractions of the label map."""
    return {"above": SIZE_BINS[index], "to": SIZE_BINS[index + 1], **values}


def _run(run: ScoredRun) -> dict:
    evaluation = run.evaluation
    tables = [
        {
            "protocol": scored.protocol,
            "mask_size": scored.mask_size,
            "panoptic": scored.panoptic,
            "without_object": scored.unlabelled,
            "rows": [_row(row) for row in scored.rows],
        }
        for scored in evaluation.tables
    ]
    return {
        "run": run.name,
        **{name: getattr(run.config, name) for name in ("preset", "stage", "seed")},
        **({"set": run.data_set} if run.data_set else {}),
        "data": evaluation.data,
        "images": evaluation.images,
        "skipped": evaluation.skipped,
        "notes": evaluation.notes,
        # These two are the first protocol's, for readers that expect one protocol.
        "mask_size": tables[0]["mask_size"],
        "rows": tables[0]["rows"],
        "reconstruction_loss": [{"orders": n, "loss": loss} for n, loss in evaluation.reconstruction.items()],
        "seconds_per_image": evaluation.seconds_per_image,
        "metric_seconds_per_image": evaluation.metric_seconds_per_image,
        "tables": tables,
    }


def _row(row: Row) -> dict:
    return {
        **{name: getattr(row, name) for name in ("masks", "num_masks", "orders", "columns")},
        **{name: row.scores[name] for name in METRICS},
        "used": row.used,
        "average_recall": row.recall,
        "counted": row.counted,
        "sizes": [_size_bin(index, mbo_i=mean, instances=number) for index, (mean, number) in enumerate(row.sizes)],
    }
