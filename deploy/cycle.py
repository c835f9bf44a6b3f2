"""One cycle's result: the fine-tuned network on its grids, packed, read back and measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from compress import LayerBudget, NetworkConfig, model_bytes, snap_to_grid
from deploy import pack
from estimate import block_features
from search import compliance


@dataclass(frozen=True)
class Cycle:
    """What one cycle chose and what was measured of it; a row of cycles.csv (row 0: the uncompressed baseline).

    Accuracies and drops in points, sizes in bytes. ``acc``: after fine-tuning; ``grid_acc``: with the weights on their
    grids; ``deployed_acc``: of the packed file, BatchNorm's statistics estimated again.
    """
    cycle: int
    acc: float
    drop: float
    deployed_acc: float | None = None
    grid_acc: float | None = None
    acc_before_finetune: float | None = None
    retained: float = 1.0
    cr: float = 1.0
    msr: float = 0.0
    cr_unweighted: float = 1.0
    packed_bytes: int | None = None
    whole_model_ratio: float = 1.0
    sparsity: float = 0.0
    average_bits: float = 32.0
    average_keep: float = 1.0
    compliance: float | None = None
    voted_retained: float = 1.0
    voted_compliance: float | None = None
    finetune_epochs: int = 0
    finetune_best_epoch: int = 0
    surrogate_active: bool = False
    surrogate_prediction: float | None = None


@dataclass
class Best:
    """The best cycle so far: its row, what it chose, and its network after fine-tuning and as a packed file."""
    row: Cycle | None = None
    config: NetworkConfig | None = None
    budgets: tuple[LayerBudget, ...] = ()
    masks: dict = field(default_factory=dict)
    grids: dict | None = None  # of training on the grid; None where the weights are on none yet
    network: dict = field(default_factory=dict)  # state dict after fine-tuning
    packed: bytes = b""

    def state_dict(self) -> dict:
        """Return the fields as a plain dictionary."""
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        """Take over what :meth:`state_dict` returned."""
        vars(self).update(state)


def measure(run, cycle: int, tuned: dict, voted: NetworkConfig, new: Best, out) -> Cycle:
    """Pack the fine-tuned network into ``new``; return the row of what the file holds and how accurate it is.

    ``run``: hirelc.Run, whose network holds the fine-tuned weights, and afterwards what was read back from the file;
    ``tuned``: of hirelc.finetune; ``out``: hirelc.Outcome so far.
    """
    c, chosen, best, log = run.config, new.config, tuned["best"], run.log
    grids = new.grids or snap_to_grid(run.blocks, chosen, new.masks)
    grid_acc = run.score()
    estimated = run.estimate_batchnorm()
    new.packed = pack.pack(run.model, run.blocks, chosen, new.masks, grids, run.network, c.pack.rest, log.note)
    pack.load(new.packed, run.model)
    deployed = run.score() if estimated or c.pack.rest != "float32" else grid_acc
    prediction = out.surrogate.predict([block_features(chosen.joined)])[0] if out.surrogate.active else None
    row = Cycle(
        cycle=cycle, acc=best.acc, drop=out.baseline["acc"] - best.acc, deployed_acc=deployed, grid_acc=grid_acc,
        acc_before_finetune=tuned["before"], retained=chosen.retained, cr=chosen.cr, msr=chosen.msr,
        cr_unweighted=chosen.cr_unweighted, packed_bytes=len(new.packed),
        whole_model_ratio=model_bytes(run.model) / len(new.packed), sparsity=chosen.sparsity,
        average_bits=chosen.joined.average_bits, average_keep=chosen.joined.average_keep,
        compliance=compliance(chosen, new.budgets), voted_retained=voted.retained,
        voted_compliance=compliance(voted, new.budgets), finetune_epochs=tuned["epochs"],
        finetune_best_epoch=best.epoch, surrogate_active=out.surrogate.active, surrogate_prediction=prediction)
    log.info(f"cycle {cycle}: accuracy {row.acc:.2f} (before fine-tuning {row.acc_before_finetune:.2f}, on the grid "
             f"{grid_acc:.2f}, packed file {deployed:.2f}), drop {row.drop:.2f}, CR {row.cr:.2f}, "
             f"{row.packed_bytes:,} bytes, whole model {row.whole_model_ratio:.2f}, sparsity "
             f"{100 * row.sparsity:.1f} %, compliance {row.compliance:.1f} %")
    return row
