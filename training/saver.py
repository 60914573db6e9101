"""When a run is validated and saved, and what of it. Start at `Saver.settle`."""

import copy
import time
from pathlib import Path
from typing import Any

from clipserve.embed import prepare as prepare_for_inference
from clipserve.errors import first_line
from clipserve.model import Model
from training.distributed import ALONE
from training.evaluate.retrieval import evaluate_retrieval
from training.recipe import Run
from training.run_directory import RunDirectory
from training.signals import Wish
from training.track import Tracker


class Saver:
    """Validates and saves one run. Every rank has one, and calls the same of it.

    What was missed, by a stop or a failure, follows from the counters and is made up for.
    """

    def __init__(self, run: Run, directory: RunDirectory, tracker: Tracker) -> None:
        self._run, self._directory, self._tracker = run, directory, tracker
        self.metrics: dict[str, float] = {}
        """of the last validation; only the first rank has them"""
        self.aside: Path | None = None
        """the last checkpoint, if it is none that the run goes on from"""
        self._saved_step = run.state.counters.step
        self._saved_at = time.monotonic()
        self._is_wanted = False

    @property
    def due(self) -> Wish:
        """The checkpoint that time asks for."""
        minutes = self._run.config.train.checkpoint_every_minutes
        is_due = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return Wish.SAVE if is_due else Wish.NOTHING

    def settle(self, is_wanted: bool = False) -> None:
        """Validate and save what is due, or wanted, after the last step.

        After a skipped step not yet: the weights may be broken.
        """
        run, counters = self._run, self._run.state.counters
        self._is_wanted |= is_wanted
        is_last = counters.step == run.total_steps
        if counters.is_unproven and not is_last:
            return
        ended = run.state.position.epoch * run.stream.order.batches_per_epoch
        every = run.config.train.checkpoint_every_steps or run.total_steps + 1
        if counters.validated < (counters.step if is_last else ended):
            self._validate()
            self._write(self.metrics)
        elif self._is_wanted or counters.step // every > self._saved_step // every:
            self.save()
        self._is_wanted = False

    def save(self) -> None:
        """A checkpoint of the last step, if there is none; aside if that step was skipped."""
        counters = self._run.state.counters
        if counters.step != self._saved_step:
            self._write({}, is_aside=counters.is_unproven)

    def save_despite(self, failure: Exception, is_shared: bool = True) -> None:
        """Save the steps done so far; if that fails too, the first failure is the one to tell.

        `is_shared`: all ranks are there and do the same.
        """
        latest = self._directory.path / "latest"
        if reason := self._try_to_save(is_shared):
            failure.add_note(f"and no checkpoint could be written: {reason}")
            if latest.exists():
                failure.add_note(f"the last one is {latest.resolve()}")
        if self.aside is not None:
            start = f"goes on from {latest.resolve()}" if latest.exists() else "starts anew"
            failure.add_note(
                f"the weights, which may be broken, are kept as {self.aside} for --resume; the same"
                f" command {start}"
            )

    def _try_to_save(self, is_shared: bool) -> str | None:
        """Why that was not possible, if it was not."""
        state = self._run.state
        if state.counters.step == self._saved_step:
            return None
        if state.is_torn:
            return "the step was changing the weights"
        if state.is_split and not is_shared:
            return "split weights are saved by all processes together"
        try:
            self._run.adapters.merge()  # for which there may have been no memory in the step
            self.save()
        except Exception as error:  # a GPU may be too full for this too
            return first_line(error)
        return None

    def _validate(self) -> None:
        run, counters = self._run, self._run.state.counters
        if run.val is not None:
            try:
                self.metrics = _evaluate(run)
            except Exception as error:  # a GPU without room for it, say
                self.save_despite(error, is_shared=False)
                raise
            self._tracker.log(counters.step, self.metrics)
        if (rule := run.config.train.early_stop) is not None:
            if run.world.is_main:
                counters.watch(self.metrics[rule.metric])
            counters.stale = int(run.world.exchange(counters.stale)[0, 0])
        counters.validated = counters.step

    def _write(self, scores: dict[str, float], is_aside: bool = False) -> None:
        run, counters = self._run, self._run.state.counters
        if run.world.is_main or run.state.is_split:
            # `best` first: what `latest` says was best must be linked.
            links = () if is_aside else ("best", "latest") if self._is_best(scores) else ("latest",)
            world = run.world if run.state.is_split else ALONE
            self._directory.save(run.state, _describe(run, scores), links, world)
        self.aside = self._directory.folder_of(counters.step, is_aside) if is_aside else None
        self._saved_step, self._saved_at = counters.step, time.monotonic()

    def _is_best(self, scores: dict[str, float]) -> bool:
        """Whether these are better than all before, which is then remembered."""
        counters = self._run.state.counters
        if not scores:
            return False
        score = scores[self._run.config.train.best_metric]
        if counters.best is not None and score <= counters.best:
            return False
        counters.best = score
        return True


def _evaluate(run: Run) -> dict[str, float]:
    """Retrieval on the validation shards, by the model as it would be served.

    All ranks take part, the first has the numbers.
    """
    assert run.val is not None
    trained = run.state.whole()
    network = trained.network
    if not run.state.is_split:
        network = copy.deepcopy(network)  # the tokenizer's tables would take longer
    served = Model(
        network, trained.architecture, trained.transform, trained.tokenizer, trained.info
    )
    model = prepare_for_inference(served, str(run.device))
    settings = run.config.train
    return evaluate_retrieval(
        model,
        run.val,
        prefix="val/",
        rerank=settings.rerank,
        score=settings.rerank_score,
        world=run.world,
    )


def _describe(run: Run, scores: dict[str, float]) -> dict[str, Any]:
    """What the model directory says of how the model was trained."""
    counters = run.state.counters
    summary = {
        "step": counters.step,
        "samples": counters.samples,
        "epoch": counters.step / run.stream.order.batches_per_epoch,
        "seconds": round(counters.seconds, 1),
        "device": str(run.device),
        "precision": run.precision.name,
        "processes": run.world.size,
        **run.state.model.info.training,  # of model.pretrained: what the run began with
        **scores,
    }
    return {
        "objective": tuple(objective.name for objective in run.config.objectives),
        "training": summary,
        "data_fingerprint": "+".join(d.fingerprint for d in run.stream.data.datasets),
    }
