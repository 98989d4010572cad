"""What of a model is in memory: parts that are read when they are asked for and go when others need the room."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import jax
from jax.sharding import Mesh

from wanjax import sharding, streaming
from wanjax.config import ModelConfig
from wanjax.tokenizer import Tokenizer

POLICIES = ("keep", "stage", "stream")

ORDER = ("umt5", "clip", "vae", "dit", "vae")
"""In which a clip needs the parts."""

Read = Callable[[str, Mesh | None, sharding.Rules], Any]
"""(name, mesh, rules) -> the parameters of a part, on that mesh or on the default device."""


class Parts(Mapping[str, Any]):
    """Parameters by part, read when they are first asked for; safe to use from several threads.

    Args:
      held: what is in memory already; kept and changed.
      read: how a part is read; None where `held` is all there is.
      names: of the parts that can be read.
      stage: whether reading one part frees the others.
      mesh, rules: where parts are put.
      ahead: has a part's files brought to host memory, in a thread, while the part before it in `ORDER` is at work.
    """

    def __init__(
        self,
        held: dict[str, Any],
        read: Read | None = None,
        names: Sequence[str] = (),
        stage: bool = False,
        mesh: Mesh | None = None,
        rules: sharding.Rules = sharding.RULES,
        ahead: Callable[[str], None] | None = None,
    ) -> None:
        self.held, self.stage, self.mesh, self.rules, self._ahead = held, stage, mesh, rules, ahead
        self._read = read
        self._names = tuple(names) or tuple(held)
        self._lock = threading.RLock()

    def __getitem__(self, name: str) -> Any:
        return self.get_on(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def get_on(self, name: str, mesh: Mesh | None) -> Any:
        """A part, read or moved onto `mesh` where one is given, else as it lies or onto the parts' own.

        Raises:
          KeyError: no such part. ValueError: it was freed, and there is no folder to read it from.
        """
        if name not in self._names:
            raise KeyError(name)
        with self._lock:
            if name not in self.held:
                if self._read is None:
                    raise ValueError(f"part {name!r} was freed and was not read from a folder; make the model again")
                if self.stage:
                    for other in tuple(self.held):
                        self.free(other)
                self.held[name] = self._read(name, mesh or self.mesh, self.rules)
                following = next((after for one, after in pairwise(ORDER) if one == name and after in self), None)
                if self.stage and self._ahead is not None and following is not None:
                    threading.Thread(target=self._ahead, args=(following,), daemon=True, name="ahead").start()
            elif mesh is not None:
                self.held[name] = sharding.shard_params(self.held[name], mesh, self.rules)
            return self.held[name]

    def free(self, name: str) -> None:
        """Gives the memory of a part back, whoever still holds its arrays. KeyError for no such part."""
        if name not in self._names:
            raise KeyError(name)
        with self._lock:
            for leaf in jax.tree.leaves(self.held.pop(name, None)):
                if isinstance(leaf, jax.Array) and not leaf.is_deleted():
                    leaf.delete()

    def on(self, mesh: Mesh, rules: sharding.Rules) -> "Parts":
        """The same parts on a mesh: those in memory are moved, the others will be read there."""
        with self._lock:
            held = {name: sharding.shard_params(tree, mesh, rules) for name, tree in self.held.items()}
            return Parts(held, self._read, self._names, self.stage, mesh, rules, self._ahead)


@dataclass(frozen=True)
class Model:
    """A model ready to run.

    Attributes:
      config: sizes and precision.
      params: {"dit", "vae", "umt5", "clip"} -> nested dict of arrays ("clip" absent for text-to-video). Under the
        policy "keep" a plain dict; under "stage" a mapping that reads a part when it is looked up and frees the others,
        so nothing of a part may be used after another was asked for. Under "stream" so too, and "dit" is what
        `streaming.restore` gives.
      tokenizer: of the text encoder.
      parts: where `params` are read again after `free`; made from `params` where it is not given or is of others.
    """

    config: ModelConfig
    params: Mapping[str, Any]
    tokenizer: Tokenizer
    parts: Parts | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        own = self.parts
        if isinstance(self.params, Parts):
            own = self.params
        elif own is None or own.held is not self.params:  # as after dataclasses.replace(model, params=...)
            own = Parts(self.params if isinstance(self.params, dict) else dict(self.params))
        object.__setattr__(self, "parts", own)

    @property
    def policy(self) -> str:
        """Of POLICIES: how its parts lie in memory."""
        if self.config.dit.stream != "no":
            return "stream"
        return "stage" if self.parts.stage else "keep"

    def part(self, name: str, mesh: Mesh | None = None) -> Any:
        """The parameters of "dit", "vae", "umt5" or "clip", read if they are not in memory.

        Args:
          mesh: where to; None leaves it where it lies, or reads it onto the mesh that the model was loaded for.

        Raises:
          ValueError: no such part, or one that was freed and cannot be read again. CheckpointError: damaged weights.
        """
        self._check(name, mesh)
        return self.parts.get_on(name, mesh)

    def free(self, name: str) -> None:
        """Frees a part: its arrays are deleted, and may not be used by whoever still holds them.

        Raises:
          ValueError: no such part.
        """
        self._check(name)
        self.parts.free(name)

    def place(self, mesh: Mesh, rules: sharding.Rules = sharding.RULES) -> "Model":
        """The same model on a mesh: parts in memory are moved there, others will be read there.

        Raises:
          ValueError: of the policy "stream".
        """
        self._check(mesh=mesh)
        parts = self.parts.on(mesh, rules)
        return replace(self, params=parts if isinstance(self.params, Parts) else parts.held, parts=parts)

    def _check(self, name: str | None = None, mesh: Mesh | None = None) -> None:
        if self.config.dit.stream != "no":
            streaming.check_mesh(mesh)
        if name is not None and name not in self.parts:
            raise ValueError(f"model {self.config.name}: no part {name!r}; it has {', '.join(self.parts)}")
