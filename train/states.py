"""Training states on disk: Orbax keeps the last few, written in the background, each whole or not at all."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from spotlight_jax.errors import InputError
from train.step import TrainState


class StateStore:
    """Checkpoints of one run: training state, step, position in the text, PRNG key."""

    def __init__(self, folder: pathlib.Path, keep: int) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Save in the background; a step that is already saved is left as it is."""
        if self.latest() == step:
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            position=ocp.args.JsonSave(position),
            shapes=ocp.args.JsonSave(_shapes(state)),
        )
        self._manager.save(step, args=args)

    def load(self, template: TrainState) -> tuple[int, TrainState, dict[str, Any]]:
        """The newest checkpoint; raises InputError where there is none or its arrays have other shapes."""
        step = self.latest()
        if step is None:
            raise InputError("the run has no checkpoint to resume from; start it anew in another folder")
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), position=ocp.args.JsonRestore())
        try:
            # Asked first: Orbax notices other shapes too, and leaves failed tasks behind that print their tracebacks.
            saved = self._manager.restore(step, args=ocp.args.Composite(shapes=ocp.args.JsonRestore()))["shapes"]
            if saved != _shapes(template):
                raise ValueError("its arrays have other shapes")
            restored = self._manager.restore(step, args=args)
        except (ValueError, KeyError, FileNotFoundError) as error:
            reason = str(error).splitlines()[0][:200]
            raise InputError(f"checkpoint {step} is damaged or of another model or config: {reason}") from None
        return step, restored["state"], restored["position"]

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _shapes(tree: Any) -> dict[str, list[int]]:
    """Shape of each array by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): list(leaf.shape) for path, leaf in leaves}
