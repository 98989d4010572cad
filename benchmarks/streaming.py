"""One guided step with the transformer's kernels on the device, and with them in host memory, in both forms.

    python -m benchmarks.streaming --layers 10 --out streaming.json

"keep" has all weights on the device. "loop" is one program a layer, called by the host, which sends the next layer's
kernels meanwhile; "program" is one program whose scan copies each layer's from host memory. Each is done with weights
as they are and with int8 kernels, in turn, A B C A B C. Where copies go on beside the work, a form takes as long as
keep, or as the link needs for what is moved.
"""

import argparse
import dataclasses
import sys
from typing import Any

import jax
import numpy as np

from benchmarks import measure, random_model
from samplers import pipeline
from samplers.plan import Plan, Settings
from samplers.programs import Programs
from wanjax import checkpoint, shapes, streaming
from wanjax.config import PRESETS, ModelConfig, preset
from wanjax.guidance import MODES
from wanjax.method import METHODS

FORMS = ("no", "loop", "program")
ROW = np.int32(1)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser("python -m benchmarks.streaming", description=__doc__.split("\n", 1)[0])
    line.add_argument("--preset", choices=sorted(PRESETS), default="flf2v_14b")
    line.add_argument("--layers", type=measure.positive, help="fewer than the transformer has")
    line.add_argument("--size", type=measure.parse_size, default=(480, 864), metavar="HEIGHTxWIDTH")
    line.add_argument("--frames", type=measure.positive, default=81)
    line.add_argument("--method", choices=sorted(METHODS), default="paper")
    line.add_argument("--guidance-mode", choices=MODES, default="sequential")
    line.add_argument("--dtype", choices=sorted(measure.POLICIES), default="bfloat16")
    line.add_argument("--repeats", type=measure.positive, default=3)
    line.add_argument("--out", type=measure.output, help="JSON file")
    return line


class Steps:
    """The same step in every form, on the same random weights and inputs."""

    def __init__(self, model: ModelConfig, settings: Settings) -> None:
        plan = Plan.of(model, settings)
        params = random_model.params(shapes.dit(model.dit))
        latents, self._conditions, self._negative = jax.device_put(
            random_model.inputs(model.dit, plan.latent_shape[:3], 1, 1)
        )
        self._carry = pipeline.start(plan, latents)
        self._plans, self._params = {}, {}
        for form in FORMS:
            config = dataclasses.replace(model, dit=dataclasses.replace(model.dit, stream=form))
            self._plans[form] = Plan.of(config, settings)
            self._params[form] = params if form == "no" else streaming.moved(params, form)
        kernels = [leaf.nbytes for layer in self._params["loop"].layers for leaf in layer.values()]
        self.streamed_bytes = sum(kernels)

    def run(self, form: str) -> jax.Array:
        """The latents after the step."""
        plan = self._plans[form]
        told = (self._conditions, self._negative, plan.method, None)
        return Programs.of(plan).denoise(self._params[form], self._carry, plan.table, ROW, *told).sample


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Times and differences of all forms."""
    full = checkpoint.with_dtype(preset(args.preset), args.dtype)
    layers = args.layers or full.dit.num_layers
    model = dataclasses.replace(full, dit=dataclasses.replace(full.dit, num_layers=layers))
    settings = Settings.of(model, size=args.size, frames=args.frames, method=args.method,
                           guidance_mode=args.guidance_mode)  # fmt: skip
    passes = 1 if args.guidance_mode == "batched" or settings.guidance == 1 else 2
    found: dict[str, Any] = {}
    for weights in ("as stored", "int8"):
        own = model if weights == "as stored" else checkpoint.with_weights(model, weights)
        steps = Steps(own, settings)
        wanted = np.asarray(steps.run("no"))
        differ = {form: measure.relative_error(steps.run(form), wanted) for form in FORMS}
        timed = measure.interleave(
            {form: lambda form=form, steps=steps: steps.run(form) for form in FORMS}, args.repeats
        )
        for form, timing in timed.items():
            moved = 0 if form == "no" else passes * steps.streamed_bytes
            found[f"{'keep' if form == 'no' else form}, {weights}"] = timing.report() | {
                "ratio": timing.median / timed["no"].median, "relative_error": differ[form], "moved_bytes": moved,
            }  # fmt: skip
    return {"runs": found, "layers": layers} | measure.peak()


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    line = parser()
    args = line.parse_args(argv)
    measure.check_clip(line, preset(args.preset), args.size, args.frames)
    measure.backend(line)

    return measure.guarded(line, lambda: run(args))


def run(args: argparse.Namespace) -> bool:
    """Measures, prints and writes; whether all forms give the same."""
    found = measured(args)
    rows = [[name, f"{one['median_seconds']:.4g} s", f"{one['ratio']:.2f}", f"{one['relative_error']:.1e}",
             f"{one['moved_bytes'] / 1e9 / one['median_seconds']:.1f} GB/s"]
            for name, one in found["runs"].items()]  # fmt: skip
    measure.print_table(("kernels", "a guided step", "to keep", "difference", "from the host"), rows)
    names = ("preset", "size", "frames", "method", "guidance_mode", "dtype")
    own = {"benchmark": "streaming", "environment": measure.environment()} | {
        name: getattr(args, name) for name in names
    }
    measure.write(args.out, own | found)
    # Of half precision what XLA fuses in another program may be rounded elsewhere.
    return all(one["relative_error"] < (1e-5 if args.dtype == "float32" else 0.02) for one in found["runs"].values())


if __name__ == "__main__":
    sys.exit(main())
