"""Resume exactly where a run stopped: random states and the position in the data.

mmengine's checkpoints hold the model, the optimizer and the schedules, but no random state, and
``Runner.train`` does not know where in its data a checkpoint was written:

- an epoch loop that resumes from a checkpoint of an iteration repeats the whole epoch;
- an iteration loop "advances" its data loader, upstream by loading every image once more;
- a run without a fixed seed draws another order of the data after every start;
- gradients that wait for the next step are lost (see ``pending_gradients``).
"""
from __future__ import annotations

import logging
import random

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop
from torch.utils.data import DataLoader, IterableDataset

from ..registry import HOOKS
from . import pending_gradients

__all__ = ['RandomStateHook', 'get_random_state', 'set_random_state']

KEY = 'random_state'


def get_random_state() -> dict:
    """State of Python's, NumPy's, PyTorch's and the current CUDA device's generators.

    Only tensors, numbers and None: ``torch.load(weights_only=True)`` reads it.
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return dict(
        python=(version, torch.tensor(words, dtype=torch.int64), gauss),
        numpy=(kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss),
               float(cached)),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None)


def set_random_state(state: dict) -> None:
    """Set the generators to what :func:`get_random_state` returned, on any device."""
    version, words, gauss = state['python']
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, *rest = state['numpy']
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'].cpu())
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Makes a resumed run equal to the uninterrupted one.

    Saves the random states of all ranks in every checkpoint, and on resume restores them just
    before the first batch is fetched; so it does with gradients that are being accumulated. The
    data stream continues at the batch after the last one that was trained on, without loading what
    is skipped. A validation leaves the states as it found them, because it runs after the
    checkpoint of its epoch is written.

    With ``num_workers=0`` on a CPU the resumed run is equal bit for bit. With worker processes
    the order of the data is right, and the augmentations are drawn anew.

    Priority LOW: before ``CheckpointHook``, after the hooks that change what it saves.
    """

    priority = 'LOW'

    def __init__(self):
        # (position, states of all ranks, gradients of all ranks)
        self._saved: tuple[tuple, list, dict | None] | None = None
        self._before_val: dict | None = None
        self._loaded: dict | None = None
        self._loaded_gradients: dict | None = None
        self._original_loader: DataLoader | None = None

    # --- saving -------------------------------------------------------------------------------
    # Only rank 0 writes, so the states have to be gathered where all ranks are, and only then:
    # gathering in every iteration would cost a synchronisation each.

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Collect the states if a checkpoint follows in this iteration."""
        self._saved = None  # those of an earlier iteration, with gradients as large as the model
        if any(not hook.by_epoch and (
                hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
                or hook.save_last and hook.is_last_train_iter(runner))
               for hook in _checkpoint_hooks(runner)):
            self.gather(runner)

    def after_train_epoch(self, runner) -> None:
        """Collect the states if a checkpoint follows after this epoch."""
        if any(hook.by_epoch for hook in _checkpoint_hooks(runner)):
            self.gather(runner)

    def before_val(self, runner) -> None:
        """Remember the states: a validation must not disturb the training that follows it."""
        if not isinstance(runner._train_loop, BaseLoop):
            return  # only evaluating; asking the runner for its epoch would build the train loop
        self._before_val = get_random_state()
        if any(hook.save_best for hook in _checkpoint_hooks(runner)):
            self.gather(runner)

    def after_val(self, runner) -> None:
        """Put the states back."""
        if self._before_val is not None:
            set_random_state(self._before_val)
            self._before_val = None

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Add the states to the checkpoint (rank 0)."""
        if self._saved is None or self._saved[0] != _position(runner):
            if get_world_size() > 1:
                print_log('This checkpoint holds no random states: it was not written by '
                          "CheckpointHook, and the other ranks' states are out of reach.",
                          logger='current', level=logging.WARNING)
                return
            self._saved = (_position(runner), [get_random_state()],
                           pending_gradients.collect(runner))
        sampler = _sampler(runner.train_loop.dataloader)
        checkpoint[KEY] = dict(
            ranks=self._saved[1], sampler_seed=getattr(sampler, 'seed', None),
            batches_per_epoch=len(runner.train_loop.dataloader))
        if self._saved[2] is not None:
            checkpoint[pending_gradients.KEY] = self._saved[2]

    def gather(self, runner) -> None:
        """Collect the states for a checkpoint that is written now; call on all ranks."""
        state = self._before_val or get_random_state()
        self._saved = (_position(runner), all_gather_object(state),
                       pending_gradients.collect(runner))

    # --- restoring ----------------------------------------------------------------------------

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Keep what the checkpoint holds until training starts."""
        gradients = checkpoint.pop(pending_gradients.KEY, None)
        if runner._resume:
            self._loaded_gradients = gradients
            self._loaded = checkpoint.pop(KEY, None) or dict(
                ranks=[], sampler_seed=None, batches_per_epoch=None)

    def before_train(self, runner) -> None:
        """On resume, continue random states and data where the checkpoint was written."""
        loaded, self._loaded = self._loaded, None
        gradients, self._loaded_gradients = self._loaded_gradients, None
        loop = runner.train_loop
        if loaded is None or loop.iter == 0:
            return
        pending_gradients.restore(runner, gradients)
        state = None
        if len(loaded['ranks']) == get_world_size():
            state = loaded['ranks'][get_rank()]
        else:
            print_log(f'Random states not restored: the checkpoint holds {len(loaded["ranks"])}, '
                      f'this run has {get_world_size()} process(es). Training continues with '
                      'fresh random numbers.', logger='current', level=logging.WARNING)
        loader = loop.dataloader
        sampler, seed = _sampler(loader), loaded['sampler_seed']
        if seed is not None and getattr(sampler, 'seed', seed) != seed:
            sampler.seed = seed
        if state is not None:
            set_random_state(state)  # a validation may come before the first batch
        # Without positions to count, mmengine's own way is left in place.
        countable = (not isinstance(loader.dataset, IterableDataset)
                     and loader.batch_sampler is not None)
        if countable and isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = _ResumedIterator(
                loader, loop.iter, state,
                replay=not hasattr(loop.dataloader_iterator, 'skip_iter'))
            return
        if (countable and isinstance(loop, EpochBasedTrainLoop)
                and loaded['batches_per_epoch'] == len(loader)):
            # A checkpoint of the epoch's last iteration still lacks the end of the epoch
            # (schedules, validation): an epoch without batches makes up for it.
            done = loop.iter - loop.epoch * len(loader)
            if 0 < done <= len(loader):
                print_log(f'Resuming inside epoch {loop.epoch + 1}: its first {done} batches are '
                          'skipped without loading them.', logger='current')
                self._original_loader = loader
                loop.dataloader = _ResumedLoader(loader, done, state)

    def before_train_epoch(self, runner) -> None:
        """Return to the ordinary loader once the interrupted epoch is complete."""
        if self._original_loader is not None and runner.train_loop.dataloader.used:
            runner.train_loop.dataloader = self._original_loader
            self._original_loader = None


class _ResumedLoader:
    """A data loader whose first pass starts at batch ``skip``; otherwise the loader itself."""

    def __init__(self, loader: DataLoader, skip: int, state: dict | None):
        self._loader, self._skip, self._state = loader, skip, state
        self.used = False

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def __len__(self):
        return len(self._loader)

    def __iter__(self):
        self.used = True
        indices = iter(self._loader.batch_sampler)
        for _ in range(self._skip):
            next(indices)
        return _start(_with_indices(self._loader, indices), self._state)


class _ResumedIterator:
    """The endless stream of an iteration loop, starting at batch ``skip``.

    ``replay``: the loop asks for the skipped batches first (mmengine 0.10.7 does, and throws
    them away); it gets None for each of these.
    """

    def __init__(self, loader: DataLoader, skip: int, state: dict | None, replay: bool):
        self._loader, self._skip, self._state = loader, skip, state
        self._to_replay = skip if replay else 0
        self._iterator, self._epoch = None, 0

    def skip_iter(self, count: int) -> None:
        """Called by onedl-mmengine's loop instead of asking for the skipped batches."""
        assert count == self._skip

    def __iter__(self):
        return self

    def __next__(self):
        if self._to_replay:
            self._to_replay -= 1
            return None
        if self._iterator is None:
            self._rewind()
            self._iterator = _start(_with_indices(self._loader, self._skipped()), self._state)
        try:
            return next(self._iterator)
        except StopIteration:
            self._next_epoch()
            self._iterator = iter(self._loader)
            return next(self._iterator)

    def _rewind(self) -> None:
        # mmengine's InfiniteSampler keeps its place in a generator, and with worker processes
        # upstream has prefetched from it by the time a checkpoint is read.
        sampler = _sampler(self._loader)
        if hasattr(sampler, '_indices_of_rank'):
            sampler.indices = sampler._indices_of_rank()

    def _skipped(self):
        indices = iter(self._loader.batch_sampler)
        for _ in range(self._skip):
            try:
                next(indices)
            except StopIteration:
                self._next_epoch()
                indices = iter(self._loader.batch_sampler)
                next(indices)
        return indices

    def _next_epoch(self) -> None:
        self._epoch += 1
        sampler = _sampler(self._loader)
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(self._epoch)


def _start(loader: DataLoader, state: dict | None):
    # Creating an iterator draws a number, which the uninterrupted run has drawn long before.
    iterator = iter(loader)
    if state is not None:
        set_random_state(state)
    return iterator


def _with_indices(loader: DataLoader, indices) -> DataLoader:
    """A copy of ``loader`` that takes its batches of indices from an iterator, once."""
    options = dict(prefetch_factor=loader.prefetch_factor,
                   multiprocessing_context=loader.multiprocessing_context)
    return DataLoader(
        loader.dataset, batch_sampler=_Once(indices), num_workers=loader.num_workers,
        collate_fn=loader.collate_fn, pin_memory=loader.pin_memory, timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn, generator=loader.generator,
        **(options if loader.num_workers else {}))


class _Once:
    def __init__(self, iterator):
        self._iterator = iterator

    def __iter__(self):
        return self._iterator


def _sampler(loader: DataLoader):
    batches = getattr(loader, 'batch_sampler', None)
    return getattr(batches, 'sampler', None) or getattr(loader, 'sampler', None)


def _checkpoint_hooks(runner) -> list[CheckpointHook]:
    return [hook for hook in runner._hooks if isinstance(hook, CheckpointHook)]


def _position(runner) -> tuple:
    return runner.epoch, runner.iter
