"""The result of an epoch on volumes that were not trained on: scores of the raw and of the averaged network."""

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainables.data.folds import Split
from trainables.metrics import score_metrics
from trainables.network.batchnorm import set_groups
from trainables.step import TrainingStep
from trainables.subject_auc import score_metrics_over_subjects, subjects_of_classes


class Validation:
    """The scores of a run's two networks, over all ranks; each batch one CUDA graph where the run's steps are."""

    def __init__(self, step: TrainingStep, split: Split, subjects: np.ndarray) -> None:
        """`subjects`: (N,), of the whole cohort's volumes."""
        self.step, self.split = step, split
        self.config, self.device, self.volumes = step.config, step.device, step.volumes
        self.labels = step.labels
        self.subjects = subjects[split.val]
        self.index = torch.zeros(
            self.config.validation_batch_size, dtype=torch.int64, device=self.device
        )
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def put_away(self) -> None:
        """Drop the graphs, which would keep the run on its device."""
        self.graphs.clear()

    def metrics(self) -> dict[str, Any]:
        """Return all columns of an epoch's row that come from scores."""
        labels, scale = self.labels[self.split.val], self.step.scale
        metrics: dict[str, Any] = {}
        for name, network in (("raw", self.step.network), ("ema", self.step.average.network)):
            scores = score_metrics_over_subjects(
                self.logits(network, self.split.val), labels, self.subjects, scale=scale
            )
            metrics |= {_column(key, name): value for key, value in scores.items()}
        metrics |= {f"val_auc{end}": metrics[f"val_auc_ema{end}"] for end in ("", "_low", "_high")}
        subset = _fixed_subset(self.split.train, self.labels, self.config.train_auc_volumes)
        metrics["train_auc"] = math.nan
        if len(subset):
            scores = score_metrics(
                self.logits(self.step.network, subset), self.labels[subset], scale=scale
            )
            metrics["train_auc"] = scores["auc"]
        metrics["val_positive"] = int((labels > 0).sum())
        metrics["val_negative"] = int((labels == 0).sum())
        return metrics | self._subjects(labels)

    def _subjects(self, labels: np.ndarray) -> dict[str, int]:
        """Subjects behind the class counts: volumes of one subject hold less information than as many subjects."""
        of_classes = subjects_of_classes(labels, self.subjects, self.config.num_classes)
        return {
            "val_positive_subjects": len(np.unique(self.subjects[labels > 0])),
            "val_negative_subjects": of_classes[0],
            "val_rarest_subjects": min(of_classes),
        }

    @torch.no_grad()
    def logits(self, network: nn.Module, rows: np.ndarray) -> Tensor:
        """Logits (N, C) float32 of `rows` in their order, on the CPU and on all ranks."""
        network.eval()
        set_groups(network, 1)
        per_rank = math.ceil(len(rows) / self.step.world)
        # The sampler's duplicates; dropped again below
        padded = np.resize(rows, per_rank * self.step.world)
        mine = padded[self.step.rank :: self.step.world]
        size = self.config.validation_batch_size
        if self.step.graphs and len(mine) >= size:
            logits = self._captured_logits(network, mine)
        else:
            parts = []
            for start in range(0, len(mine), size):
                with self.step.precision.autocast(self.device):
                    parts.append(network(self.volumes.batch(mine[start : start + size])).float())
            logits = torch.cat(parts)
        if self.step.world > 1:
            gathered = [torch.empty_like(logits) for _ in range(self.step.world)]
            dist.all_gather(gathered, logits)
            # Row i of rank r is padded[i * world + r]
            logits = torch.stack(gathered, dim=1).flatten(0, 1)
        return logits[: len(rows)].cpu()

    def _captured_logits(self, network: nn.Module, rows: np.ndarray) -> Tensor:
        """Logits of `rows`, each batch one CUDA graph, captured once for a network: its weights are changed in place."""
        assert self.step.stream is not None
        size = self.config.validation_batch_size
        # The last is filled up from the first
        batches = np.resize(rows, (math.ceil(len(rows) / size), size))
        with self.step.on_own_stream():
            places = torch.from_numpy(self.volumes.position[batches]).to(self.device)
            self.index.copy_(places[0])
            if id(network) not in self.graphs:
                self._batch_logits(network)  # chooses the convolution algorithms
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(
                    graph, stream=self.step.stream, capture_error_mode="thread_local"
                ):
                    logits = self._batch_logits(network)
                self.graphs[id(network)] = graph, logits
            graph, logits = self.graphs[id(network)]
            parts = []
            for place in places:
                self.index.copy_(place)
                graph.replay()
                parts.append(logits.clone())
        return torch.cat(parts)[: len(rows)]

    def _batch_logits(self, network: nn.Module) -> Tensor:
        with self.step.precision.autocast(self.device):
            return network(self.volumes.resident_batch(self.index)[0]).float()


def _column(key: str, weights: str) -> str:
    """`auc` of the `raw` weights is column `val_auc_raw`; the ends of its interval keep their place at the end."""
    for end in ("_low", "_high"):
        if key.endswith(end):
            return f"val_{key.removesuffix(end)}_{weights}{end}"
    return f"val_{key}_{weights}"


def _fixed_subset(rows: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
    """The first `size` rows by class in turn, so that even a small subset holds every class."""
    by_class = [rows[labels[rows] == label] for label in np.unique(labels[rows])]
    turns = max((len(part) for part in by_class), default=0)
    mixed = [part[i] for i in range(turns) for part in by_class if i < len(part)]
    return np.asarray(mixed[:size], dtype=np.int64)
