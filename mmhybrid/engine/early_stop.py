"""mmengine's early stop, with a count that survives a break."""
from __future__ import annotations

from mmengine.hooks import EarlyStoppingHook

from ..registry import HOOKS

__all__ = ['EarlyStopHook']

STOP = 'early_stop'  # in a checkpoint's message hub
LEAST = 1e-6  # equal scores are no improvement


@HOOKS.register_module()
class EarlyStopHook(EarlyStoppingHook):
    """Stops after ``patience`` validations that are no better; a resumed run goes on counting.

    Args:
        monitor: name of the metric.
        rule: "greater" or "less" is better.
        patience: validations.
    """

    def __init__(self, monitor: str, rule: str = 'greater', patience: int = 5):
        super().__init__(monitor, rule, min_delta=LEAST, patience=patience)

    def before_train(self, runner) -> None:
        """Go on where a resumed run was."""
        found = runner.message_hub.runtime_info.get(STOP)
        if runner._resume and isinstance(found, (list, tuple)) and len(found) == 2:
            self.wait_count, self.best_score = found

    def after_val_epoch(self, runner, metrics=None) -> None:
        """Count, and remember it for the next checkpoint."""
        super().after_val_epoch(runner, metrics or {})
        runner.message_hub.update_info(STOP, [int(self.wait_count), float(self.best_score)])
