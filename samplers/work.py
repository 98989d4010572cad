"""Checked clips on their way through the stages, a stage at a time for all of them, so that each part of the model is
needed once; what is done lies in each clip's run folder, and is not done again.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from samplers import ahead, pipeline, preview
from samplers.ahead import compile_ahead
from samplers.pipeline import Encoded, Timings
from samplers.plan import Plan
from samplers.programs import Programs
from samplers.request import Job
from samplers.resume import CARRY, ENCODED, EXPLAINED, RunFolder
from samplers.run import OnStep, bar
from samplers.sample import Carry
from wanjax import checkpoint, hosts, marks

Ready = Callable[[str], Programs]
"""Gives the programs of the stages "encode", "denoise" and "decode"."""


@dataclass
class Clip:
    """One clip between two stages.

    Attributes:
      job: what is asked for.
      seconds: by stage.
      encoded: what the transformer is told; None before that, and where it is in the run folder and not needed yet.
      carry: of the sampler; None before the first step.
      done: steps that the carry has behind it.
      explained: the latents that enter the step which is to be explained.
    """

    job: Job
    seconds: dict[str, float] = field(default_factory=dict)
    encoded: Encoded | None = None
    carry: Carry | None = None
    done: int = 0
    explained: jax.Array | None = None

    @property
    def plan(self) -> Plan:
        """Of the job."""
        return self.job.plan

    @property
    def kept(self) -> RunFolder | None:
        """Of the job."""
        return self.job.kept

    @property
    def denoised(self) -> bool:
        """Whether nothing is left but decoding."""
        looked = self.job.explain is None or self.explained is not None
        return looked and self.done == self.plan.settings.steps

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Holds the run folder, if there is one, for this process alone.

        Raises:
          OutputError: another run works in it.
        """
        first = self.kept is not None and hosts.is_first()
        with self.kept.opened() if first else nullcontext():
            yield

    def restore(self) -> None:
        """Takes the carry, and what is to be explained, from the run folder. OutputError where they are damaged."""
        if self.kept is None:
            return
        begin = ahead.start(self.plan, [self.job.settings.seed], self.job.devices)
        if (found := self.kept.read(CARRY, (np.zeros((), np.int32), begin))) is not None:
            self.done, self.carry = int(found[0]), found[1]
        if self.job.explain is not None:
            self.explained = self.kept.read(EXPLAINED, begin.sample)
            if self.explained is None and self.done > self.job.explain[1]:
                self.done, self.carry = 0, None  # it went by without being looked at

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds that a block takes to a stage."""
        begun = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begun

    def finish(self) -> None:
        """Empties the run folder, which then goes, and removes the preview: the results are written."""
        if self.kept is not None and hosts.is_first():
            self.kept.empty()
        preview = self.job.preview
        if preview is not None and hosts.is_first() and preview.is_file() and marks.foreign(preview) is None:
            preview.unlink(missing_ok=True)

    def preview(self) -> OnStep | None:
        """Writes pictures of the data estimate, where they are wanted."""
        if self.job.preview is None:
            return None
        return preview.previews(self.plan, self.job.preview, self.job.preview_every, self.job.fps)

    def keep(self, name: str, tree: Any, **told: Any) -> None:
        """Keeps something in the run folder, where there is one. OSError: a full disk."""
        if self.kept is not None:
            self.kept.keep(name, tree, **told)


@contextmanager
def loaded(job: Job, programs: Path | None) -> Iterator[tuple[checkpoint.Model, Ready, float]]:
    """A job's model, its programs, which are compiled while it is read, and the seconds that reading took.

    Args:
      programs: folder where compiled programs are kept (`samplers.kept`); None for nowhere.
    """
    start, mesh = time.perf_counter(), job.devices
    # A mesh changes where arguments lie, and so the programs.
    with nullcontext() if mesh else compile_ahead(job.plan, folder=programs) as ready:
        model = checkpoint.load(job.folder, job.dtype, mesh, policy=job.memory.policy, weights=job.weights)
        jitted = Programs.of(job.plan)
        yield model, ready or (lambda stage: jitted), time.perf_counter() - start


def encode(model: checkpoint.Model, clips: Sequence[Clip], ready: Ready) -> None:
    """Conditions of all clips that need them, of one shape and negative prompt; a part of the model after the other.

    Raises:
      FloatingPointError: NaN or inf; names the stage.
    """
    timings = Timings()
    with timings.stage("encode"):
        needed = [clip for clip in clips if not clip.denoised or clip.job.explain is not None]
        for clip in needed:
            clip.encoded = _kept_encoded(clip)
        waiting = [clip for clip in needed if clip.encoded is None]
    if waiting:
        plan, mesh = waiting[0].plan, waiting[0].job.devices
        with timings.stage("compile"):
            programs = ready("encode")
        with timings.stage("encode"), on(mesh):
            inputs, prompts = zip(*((clip.job.inputs, [clip.job.settings.prompt]) for clip in waiting), strict=True)
            for clip, one in zip(waiting, pipeline.encode(model, plan, inputs, prompts, programs), strict=True):
                clip.encoded = jax.block_until_ready(pipeline.place(one, mesh))
                clip.keep(ENCODED, (one.conditions, one.negative))
    share(timings, clips)


def denoise(
    model: checkpoint.Model,
    clips: Sequence[Clip],
    ready: Ready,
    progress: str | None = None,
    on_step: OnStep | None = None,
) -> None:
    """Denoises clips side by side: of one plan but for prompts, seeds and keyframes, all after the same step.

    Args:
      progress: what the bar says; None draws none.
      on_step: also called between two steps, with the carry of all clips; what it raises ends the run there.

    Raises:
      FloatingPointError: NaN or inf; names the step. OSError: a full disk.
    """
    plan, timings, begun = clips[0].plan, Timings(), clips[0].done
    if all(clip.denoised for clip in clips):
        return
    job, seeds = clips[0].job, [clip.job.settings.seed for clip in clips]
    with timings.stage("compile"):
        programs = ready("denoise")
    with timings.stage("denoise"), on(job.devices), ExitStack() as stack:
        noise = pipeline.noise(plan, seeds, job.devices, programs)
        carry = None if clips[0].carry is None else joined([clip.carry for clip in clips], plan, seeds, job.devices)
        shown = stack.enter_context(bar(plan.settings.steps, progress or "", progress is not None))
        steps = [shown, *(_keeping(clip, number) for number, clip in enumerate(clips))]
        steps += [] if on_step is None else [on_step]

        def each(done: int, now: Carry) -> None:
            for one in steps:
                one(done, now)

        together = _together([clip.encoded for clip in clips], job.devices)
        pipeline.denoise(model, plan, together, noise, seeds=seeds, mesh=job.devices,
                         on_step=each, programs=programs, carry=carry, first=begun)  # fmt: skip
    for clip in clips:
        clip.encoded = clip.encoded if clip.job.explain is not None else None
    share(timings, clips)


def _keeping(clip: Clip, number: int) -> OnStep:
    """Takes what a clip needs of each step's carry: the last one, that to be explained, and those that are kept."""
    steps, explained = clip.plan.settings.steps, clip.job.explain and clip.job.explain[1]
    begun, shown = clip.done, clip.preview()

    def on_step(done: int, carry: Carry) -> None:
        if shown is not None and done:
            shown(done, one_of(carry, number))
        last, looked = done == steps, done == explained and clip.explained is None
        due = clip.kept is not None and (last or done % clip.kept.every == 0) and done > begun
        if looked or due or last:
            own = one_of(carry, number)
            if looked:
                clip.explained = own.sample
                clip.keep(EXPLAINED, own.sample)
            if due:
                clip.keep(CARRY, (np.array(done, np.int32), own), step=done)
            clip.done, clip.carry = done, own  # together: from there it goes on, also alone after its neighbour failed

    return on_step


def decode(model: checkpoint.Model, clip: Clip, ready: Ready) -> np.ndarray:
    """Video uint8 [T, H, W, 3] of a denoised clip. FloatingPointError on NaN or inf."""
    timings = Timings()
    with timings.stage("compile"):
        programs = ready("decode")
    with timings.stage("decode"), on(clip.job.devices):
        (video,) = pipeline.decode(model, clip.plan, clip.carry.sample, programs)
    share(timings, [clip])
    return video


def _kept_encoded(clip: Clip) -> Encoded | None:
    """From the run folder, onto the devices."""
    found = None if clip.kept is None else clip.kept.read(ENCODED, ahead.encoded(clip.plan))
    return None if found is None else pipeline.place(Encoded(*found), clip.job.devices)


def _together(encoded: Sequence[Encoded], mesh: Mesh | None) -> Encoded:
    """Conditions of several clips as of one batch."""
    if len(encoded) == 1:
        return encoded[0]
    trees = [(one.conditions, one.negative) for one in encoded]
    return pipeline.place(Encoded(*jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)), mesh)


def joined(carries: Sequence[Carry], plan: Plan, seeds: Sequence[int], mesh: Mesh | None) -> Carry:
    """The carries of clips after the same step as one of all of them."""
    if len(carries) == 1:
        return carries[0]

    def join(axis: int, *leaves: jax.Array) -> jax.Array:
        return jnp.concatenate(leaves, axis) if leaves[0].ndim > axis else leaves[0]

    # What guidance keeps of its two passes has these in front of the batch (`guidance.Past`).
    whole = jax.tree.map(partial(join, 0), *(carry.replace(state=None) for carry in carries))
    state = jax.tree.map(partial(join, 1), *(carry.state for carry in carries))
    like = ahead.start(plan, seeds, mesh)
    whole = whole.replace(state=state)
    return jax.tree.map(lambda leaf, place: hosts.put(leaf, place.sharding) if place.committed else leaf, whole, like)


def one_of(carry: Carry, number: int) -> Carry:
    """The carry of one of several clips, with a batch axis of one."""
    if carry.sample.shape[0] == 1:
        return carry

    def take(axis: int, leaf: jax.Array) -> jax.Array:
        return lax.slice_in_dim(leaf, number, number + 1, axis=axis) if leaf.ndim > axis else leaf

    state = jax.tree.map(partial(take, 1), carry.state)
    return jax.tree.map(partial(take, 0), carry.replace(state=None)).replace(state=state)


def on(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Inside, programs run on the devices of a mesh; without one on the default device."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def share(timings: Timings, clips: Sequence[Any]) -> None:
    """Adds the seconds that clips took together to each of them, in equal parts."""
    for clip in clips:
        for name, value in timings.seconds.items():
            clip.seconds[name] = clip.seconds.get(name, 0.0) + value / len(clips)
