"""Checkpoints of the trainings here: a folder of Orbax's, and the choice to go on from its newest or to begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

KEPT = 2  # newest checkpoints


def manager(folder: Path) -> ocp.CheckpointManager:
    """Keeps the newest states of one training in `folder`; written before `save` returns."""
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.resolve(), options=options, item_handlers=ocp.StandardCheckpointHandler())


def restored(checkpoints: ocp.CheckpointManager, state: Any, resume: bool, settings: str) -> Any:
    """The newest checkpoint's state with `resume`, on the devices of the given one; else that one.

    Args:
      checkpoints: of `manager`.
      state: a new training's state.
      resume: whether the user means to go on.
      settings: what gives a state other shapes, for the message.

    Raises:
      ValueError: checkpoints are there and resume is off, or the other way round, or they hold a state of other shapes.
    """
    newest, place = checkpoints.latest_step(), checkpoints.directory.parent
    if (newest is None) == resume:
        told = "holds no checkpoint" if newest is None else "holds checkpoints; add --resume or choose another folder"
        raise ValueError(f"--out: {place} {told}")
    if newest is None:
        return state
    # Orbax finds other shapes when it reads them, and then leaves readers behind that end in a closed event loop.
    if _shapes(checkpoints.item_metadata(newest).tree) != _shapes(state):
        raise ValueError(f"--out: {place} was trained with another {settings}")
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    return checkpoints.restore(newest, args=ocp.args.StandardRestore(wanted))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path; a dataclass and the dict that Orbax makes of it have the same paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
