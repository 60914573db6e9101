"""Every vector compared: half-precision matrix products and top-k, on the CPU or on GPUs.

Legend: Q queries, N vectors, n vectors of a chunk, E embedding.
"""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from clipserve.embed import computes_bf16
from index.backends.scan import float32_error

logger = logging.getLogger(__name__)

_SCORES_AT_A_TIME = {"cpu": 2**24, "cuda": 2**28}
"""of queries by vectors: 32 MiB in bf16 on a CPU, 1 GiB in float32 on a GPU"""
_ROWS_AT_A_TIME = 65536
"""that are converted, or gathered for a mask: 64 MiB in half precision at E = 512"""
_GATHERED = 0.3
"""of the vectors: where a mask has fewer, they are gathered and the others are not compared"""
_LANES = 32
"""scores of which first the largest is found: top-k then has that many times fewer to look at, and
takes a quarter of the time (2-core Xeon with AMX, 64 x 262144 scores in bf16)"""
_GPU_FILLED = 0.8
"""of a GPU's free memory that the vectors may take"""
_UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}
_SMALLEST = {torch.bfloat16: 0.0, torch.float16: 2.0**-25, torch.float32: 0.0}
"""absolute rounding error of elements that are too small for the format's full precision"""


class TorchBackend:
    """Exact search on one device, with the vectors in half precision where that is fast.

    `errors` bounds |score - cosine|. With x' and q' the rounded vector and query,
        |<q', x'> - <q, x>|  <=  |q| |x' - x|  +  |q' - q| |x'|     (Cauchy-Schwarz),
    where |x' - x| is measured, the largest of all vectors, and |q' - q| is, too. To that comes the
    summation in float32 (`float32_error`) and, on the CPU, where a product comes out in the format
    of its factors, one more rounding of the score: u times it, u the format's unit roundoff.
    `error` is as much for any query: |q' - q| <= u |q| + sqrt(E) s, s half of the format's smallest
    step, and a score of 1.
    """

    max_breadth = 1
    lists = None

    def __init__(
        self, matrix: np.ndarray, device: str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype or default_dtype(self.device)
        self._count, embed_dim = len(matrix), int(matrix.shape[1])
        self._matrix, self._rounding = self._load(matrix)
        u, smallest = _UNIT_ROUNDOFF[self.dtype], _SMALLEST[self.dtype]
        self._output_rounding = 0.0 if self._sums_in_float32 else u
        self.error = float(self._bound(np.array(u + embed_dim**0.5 * smallest), np.array(1.0)))

    def __len__(self) -> int:
        return self._count

    def errors(self, queries: np.ndarray, last: np.ndarray) -> np.ndarray:
        exact = torch.from_numpy(queries)
        lost = (exact.to(self.dtype).float() - exact).norm(dim=1).numpy()
        return self._bound(lost, np.abs(last))

    def _bound(self, query_rounding: np.ndarray, score: np.ndarray) -> np.ndarray:
        lost = self._rounding + query_rounding + self._output_rounding * score
        return np.asarray(1.01 * lost + float32_error(int(self._matrix.shape[1])))

    @property
    def _sums_in_float32(self) -> bool:
        return bool(self.dtype == torch.float32 or self.device.type == "cuda")

    def search(
        self, queries: np.ndarray, k: int, breadth: int, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        width = min(k, self._count)
        scores = np.full((len(queries), width), -np.inf, dtype=np.float32)
        labels = np.full((len(queries), width), -1, dtype=np.int64)
        if width and len(queries):
            with torch.inference_mode():
                best = self._search(torch.from_numpy(queries), width, mask)
            found = best[0].shape[1]
            scores[:, :found] = best[0].cpu().numpy()
            labels[:, :found] = best[1].cpu().numpy()
            labels[scores == -np.inf] = -1
        return scores, labels

    def _search(self, queries: Tensor, k: int, mask: np.ndarray | None) -> tuple[Tensor, Tensor]:
        """The best k, or as many as the mask has, in order: scores float32 and labels."""
        queries = queries.to(self.device, self.dtype)
        best_scores = torch.empty((len(queries), 0), device=self.device)
        best_labels = torch.empty((len(queries), 0), dtype=torch.int64, device=self.device)
        for vectors, labels, hidden in self._chunks(len(queries), mask):
            scores, places = top(self._multiply(queries, vectors, hidden), k)
            best_scores = torch.cat([best_scores, scores.float()], dim=1)
            found = places + labels if isinstance(labels, int) else labels[places]
            best_labels = torch.cat([best_labels, found], dim=1)
            if best_scores.shape[1] > k:
                best_scores, places = best_scores.topk(k, dim=1)
                best_labels = best_labels.gather(1, places)
        order = best_scores.argsort(dim=1, descending=True)
        return best_scores.gather(1, order), best_labels.gather(1, order)

    def _chunks(
        self, num_queries: int, mask: np.ndarray | None
    ) -> Iterator[tuple[Tensor, Tensor | int, Tensor | None]]:
        """Vectors (n, E), their labels (n,) or the first of them, and which (n,) are hidden."""
        at_a_time = max(_LANES, _SCORES_AT_A_TIME[self.device.type] // num_queries)
        if mask is not None and np.count_nonzero(mask) < _GATHERED * self._count:
            chosen = torch.from_numpy(np.flatnonzero(mask)).to(self.device)
            for labels in torch.split(chosen, min(at_a_time, _ROWS_AT_A_TIME)):
                yield self._matrix.index_select(0, labels), labels, None
            return
        hidden = None if mask is None else torch.from_numpy(~mask).to(self.device)
        for start in range(0, self._count, at_a_time):
            rows = slice(start, start + at_a_time)
            yield self._matrix[rows], start, None if hidden is None else hidden[rows]

    def _multiply(self, queries: Tensor, vectors: Tensor, hidden: Tensor | None) -> Tensor:
        """Scores (Q, n); -inf where hidden."""
        if self.device.type == "cuda" and self.dtype != torch.float32:
            scores = torch.mm(queries, vectors.T, out_dtype=torch.float32)
        else:
            scores = queries @ vectors.T
        return scores if hidden is None else scores.masked_fill_(hidden, float("-inf"))

    def _load(self, matrix: np.ndarray) -> tuple[Tensor, float]:
        """The vectors on the device, and how far the one that lost most is from what it was."""
        if self.dtype == torch.float32 and self.device.type == "cpu" and matrix.dtype == np.float32:
            return torch.from_numpy(np.asarray(matrix)), 0.0
        loaded = torch.empty(matrix.shape, dtype=self.dtype, device=self.device)
        farthest = 0.0
        for start in range(0, len(matrix), _ROWS_AT_A_TIME):
            rows = slice(start, start + _ROWS_AT_A_TIME)
            exact = torch.from_numpy(np.array(matrix[rows])).to(self.device)
            loaded[rows] = exact
            lost = (loaded[rows].float() - exact.float()).norm(dim=1).max()
            farthest = max(farthest, float(lost))
        return loaded, farthest


def on_gpus(matrix: np.ndarray, device: str) -> TorchBackend | None:
    """All vectors on a GPU; None if there is none, or, as the log says, if they do not fit."""
    if not torch.cuda.is_available():
        return None
    number = int(device.partition(":")[2] or 0)
    needed, (free, _) = matrix.size * 2, torch.cuda.mem_get_info(number)
    # What torch keeps of a matrix that is gone, such as the one before the last, it will use again.
    free += torch.cuda.memory_reserved(number) - torch.cuda.memory_allocated(number)
    if needed > _GPU_FILLED * free:
        logger.info(
            "%d vectors need %.1f GiB, GPU %d has %.1f GiB free: an index is searched instead",
            len(matrix),
            needed / 2**30,
            number,
            free / 2**30,
        )
        return None
    return TorchBackend(matrix, f"cuda:{number}")


def default_dtype(device: torch.device) -> torch.dtype:
    """The format in which a device multiplies matrices fastest, of those precise enough."""
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if computes_bf16(device) else torch.float32


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest k, or all, of each row of (Q, n), and their columns, in no order.

    The best k lie in the k groups of columns whose best are largest.
    """
    num_queries, n = scores.shape
    groups = n // _LANES
    if groups < 4 * k:
        return _unordered_top(scores, min(k, n))
    whole = scores[:, : groups * _LANES].view(num_queries, _LANES, groups)
    _, chosen = _unordered_top(whole.amax(dim=1), k)  # (Q, k)
    lanes = torch.arange(0, groups * _LANES, groups, device=scores.device)
    rest = torch.arange(groups * _LANES, n, device=scores.device).expand(num_queries, -1)
    columns = torch.cat([(chosen[:, :, None] + lanes).flatten(1), rest], dim=1)
    top, places = _unordered_top(scores.gather(1, columns), k)
    return top, columns.gather(1, places)


def _unordered_top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, places = scores.topk(k, dim=1, sorted=False)
    return values, places
