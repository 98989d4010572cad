"""A small plan of the TGI benchmark on a random model, for its tests."""

import dataclasses

from nano import NANO

from benchmarks.tgi import run
from benchmarks.tgi.arms import choose
from benchmarks.tgi.neural import Neural
from benchmarks.tgi.procedural import procedural
from benchmarks.tgi.run import Plan
from benchmarks.tgi.scores import Scores
from samplers.plan import Settings
from wanjax.kab import KAB
from wanjax.method import Isolation, Method

FRAMES = 9
CONFIG = dataclasses.replace(NANO, dit=dataclasses.replace(NANO.dit, text_length=40))  # whole captions


NANO_METHOD = Method(Isolation(), KAB(layers=(0, 1), steps=(0.0, 1.0)))


def plan(arms, clips=3, batch=2, seeds=(0,), **more):
    settings = Settings.of(NANO, steps=3)
    chosen = choose(arms) if all(isinstance(arm, str) for arm in arms) else arms
    return Plan((procedural("dev", FRAMES, clips),), chosen, seeds, settings, batch, **more)


def start(a_plan, folder, model):
    """Runs a plan to its end; the closed scores."""
    described = a_plan.describe({"name": "nano", "sha256": "0"}, Neural(None)) | {"environments": []}
    with Scores(folder, described) as scores:
        run.run(a_plan, model, model, scores, Neural(None), quiet=True)
    return scores
