"""What ``mmhybrid predict`` does."""
from __future__ import annotations

import argparse
import functools
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmhybrid.errors import UserError, check_given
from mmhybrid.prediction.base import Picture, PicturePredictor, Wanted
from mmhybrid.prediction.files import KINDS, NotWritten, Results, check_apart, new_folder
from mmhybrid.prediction.results import Detection, Result
from mmhybrid.prediction.sources import Frames, Item, fetched, find_items

__all__ = ['predict']

_NO_MEMORY = ("can't allocate memory", 'Unable to allocate', 'out of memory', 'Insufficient memory')


def predict(args: argparse.Namespace) -> int:
    """Run the command.

    Args:
        args: of the parser in :mod:`mmhybrid.cli`.

    Returns:
        0; 1 if a picture could not be used; 128 + n if stopped by signal n.

    Raises:
        UserError: for everything that the user can put right.
    """
    check_given(args, 'weights', 'config', 'out', 'device')
    folder = _folder(args)
    items, notes = find_items(args.source, folder)
    if folder is not None:
        check_apart(folder, items)
    wanted = Wanted(args.score, args.classes, args.tile, args.overlap, args.batch)
    predictor = _loaded(args)
    wanted.check(predictor)
    kinds = _kinds(args.write, predictor)
    for note in notes + predictor.notes:
        print(f'note: {note.rstrip(".")}.', file=sys.stderr)
    folder = folder or new_folder('predictions')
    try:
        return _Job(predictor, wanted, Results(folder, kinds, predictor.names), len(items)
                    ).run(items)
    finally:
        with suppress(OSError):
            folder.rmdir()  # nothing could be used


def _loaded(args: argparse.Namespace) -> PicturePredictor:
    if args.weights.lower().endswith('.onnx'):
        from mmhybrid.prediction.onnx_file import OnnxPredictor

        unused = {'--config': args.config, '--device': args.device, '--tta': args.tta,
                  '--trust': args.trust, '--cfg-options': args.cfg_options}
        given = ', '.join(name for name, value in unused.items() if value)
        if given:
            raise UserError(f'{given} cannot be used with {args.weights}: an ONNX file is complete '
                            'as it was exported. Leave it out.')
        return OnnxPredictor(args.weights)
    return load(args.weights, args.config, device=args.device, tta=args.tta, trust=args.trust,
                options=args.cfg_options)


def load(*arguments, **options) -> PicturePredictor:
    """:func:`mmhybrid.load`, which needs PyTorch."""
    from mmhybrid.prediction.predictor import load

    return load(*arguments, **options)


def _folder(args: argparse.Namespace) -> Path | None:
    if args.out is None:
        return None
    folder = Path(args.out).expanduser()
    if folder.is_file():
        raise UserError(f'--out {args.out} is a file; expected a folder.')
    if folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
        raise UserError(f'--out {args.out} is not empty. Name another folder, or replace files in '
                        'it with --overwrite.')
    return folder


def _kinds(asked: list[str] | None, predictor: PicturePredictor) -> list[str]:
    if asked is None:
        return ['pictures', 'masks'] if predictor.finds_regions else ['pictures']
    unknown = [kind for kind in asked if kind not in (*KINDS, 'json')]
    if unknown:
        raise UserError(f'--write knows {", ".join(KINDS)} and json, not {unknown[0]}.')
    if 'masks' in asked and not predictor.finds_regions:
        raise UserError('--write masks is for segmentors: the class of each pixel as a PNG. The '
                        "masks of a detector's objects are in the JSON, and in --write labelme and "
                        'yolo.')
    return asked


class _Stopped(BaseException):
    """A signal asked for the end."""


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM end the work in an orderly way; gives the signals that came."""
    came: list[int] = []

    def stop(number, frame):
        came.append(number)
        raise _Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Job:
    """The items of one command, from the first to the last."""

    def __init__(self, predictor: PicturePredictor, wanted: Wanted, results: Results, total: int):
        self.predictor, self.wanted, self.results = predictor, wanted, results
        self.total, self.done, self.unused, self.empty = total, 0, 0, 0
        self.found = 0
        self.progress = _Progress(True)

    def run(self, items: list[Item]) -> int:
        """Look at all items, and write what was found, whatever happens."""
        code = 0
        with _stoppable() as came:
            try:
                with tempfile.TemporaryDirectory(prefix='mmhybrid-') as self.fetched:
                    self._all(items)
            except _Stopped:
                code = 128 + came[0]
            finally:
                # What follows is short; a second Ctrl-C ends it.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                self.progress.end()
                self._close(sys.exc_info()[1])
        self._tell(code)
        return code or int(self.unused > 0)

    def _close(self, error: BaseException | None) -> None:
        done = len(self.results.images)
        if not done:
            return
        try:
            self.results.close()
        except NotWritten as second:
            if error is None:
                raise
            print(f'\nERROR: {second}', file=sys.stderr)
        else:
            if error is not None:
                print(f'{_many(done, "picture")} done, in {self.results.folder}/.',
                      file=sys.stderr)

    def _tell(self, code: int) -> None:
        done, results = len(self.results.images), self.results
        if code:
            print(f'Stopped after {_many(done, "picture")}.')
        if self.unused:
            print(f'{self.unused} of {self.total} could not be used (named above).')
        if not done:
            return
        what = 'Regions' if self.predictor.finds_regions else _many(self.found, 'object')
        print(f'{what} of {_many(done, "picture")} in {results.folder}/: predictions.json'
              + ''.join(f', {name}/' for name in sorted(
                  each.name for each in results.folder.iterdir() if each.is_dir())))
        if self.empty:
            print(f'{_many(self.empty, "picture")} without an object of score '
                  f'{0.3 if self.wanted.score is None else self.wanted.score:g} or more '
                  '(--score lowers that).')

    # --- items ---

    def _all(self, items: list[Item]) -> None:
        waiting: list[tuple[Item, str, Picture]] = []
        for item in items:
            try:
                local = item
                if item.kind == 'address':
                    local = fetched(item, self.fetched)
                if local.kind == 'image':
                    waiting.append((item, local.path, self.predictor.read(local.path)))
                else:
                    self._pictures(waiting)
                    waiting = []
                    self._video(item, local)
            except NotWritten:
                raise
            except (UserError, MemoryError) as error:
                self._leave_out(item, local.path, error)
            if len(waiting) == self.wanted.batch:
                self._pictures(waiting)
                waiting = []
        self._pictures(waiting)

    def _leave_out(self, item: Item, path: str, error: BaseException) -> None:
        """Say why an item, which was read from `path`, is not among the results."""
        self.unused += 1
        self.progress.end()
        text = str(error) or type(error).__name__
        if item.kind == 'address':  # a copy that nobody knows
            text = text.replace(path, str(item))
        named = '' if str(item) in text else f'{item}: '
        print(f'NOT USED: {named}{text}', file=sys.stderr, flush=True)

    def _pictures(self, waiting: list[tuple[Item, str, Picture]]) -> None:
        found = self._looked([picture for _, _, picture in waiting])
        for (item, path, picture), result in zip(waiting, found, strict=True):
            self.done += 1
            if isinstance(result, BaseException):
                self._leave_out(item, path, result)
                continue
            self._count(result)
            source = path if item.kind == 'image' else None
            self.results.add(item.name, self.results.stem(item.name), result, picture.rgb(),
                             source=source)
            self.progress('picture', self.done, self.total)

    def _video(self, item: Item, local: Item) -> None:
        frames = Frames(local)
        stem = self.results.stem(item.name)
        waiting: list[Picture] = []
        try:
            for image in frames:
                waiting.append(self.predictor.take(image, str(item)))
                if len(waiting) == self.wanted.batch:
                    self._frames(item, stem, frames, waiting)
                    waiting = []
            self._frames(item, stem, frames, waiting)
            problem = frames.problem()
            if problem:
                raise UserError(f'{problem}.')
        finally:
            frames.close()
            self.results.end_film(stem)
        self.done += 1

    def _frames(self, item: Item, stem: str, frames: Frames, waiting: list[Picture]) -> None:
        number = frames.read - len(waiting)
        for picture, result in zip(waiting, self._looked(waiting), strict=True):
            if isinstance(result, BaseException):
                raise result
            number += 1
            self._count(result)
            name = f'{stem}/{number:06d}'
            self.results.add(f'{name}.jpg', name, result, picture.rgb(), film=(stem, frames.rate))
            self.progress(f'{item}: picture', number, frames.count)

    def _count(self, result: Result) -> None:
        if isinstance(result, Detection):
            self.found += len(result)
            self.empty += not len(result)

    # --- pictures ---

    def _looked(self, pictures: list[Picture]) -> list[Result | BaseException]:
        """A result for each picture, or why there is none."""
        try:
            return self.predictor.look(pictures, self.wanted, functools.partial(
                _Progress(False), 'tile'))
        except (UserError, RuntimeError, MemoryError) as error:
            if len(pictures) == 1:
                return [_reason(pictures[0], error)]
        torch = sys.modules.get('torch')
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [self._looked([picture])[0] for picture in pictures]


def _many(count: int, what: str) -> str:
    return f'{count} {what}{"" if count == 1 else "s"}'


def _reason(picture: Picture, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    height, width = picture.size
    if isinstance(error, MemoryError) or any(part in str(error) for part in _NO_MEMORY):
        return UserError(f'the memory does not suffice for a picture of {width} x {height}. Cut it '
                         'into tiles with --tile 1024, or take fewer at once with --batch 1.')
    if 'torch' not in sys.modules:
        raise error
    from mmhybrid.engine.explanations import explain

    if explain(error) is None:
        raise error
    return UserError(explain(error))


class _Progress:
    """How far the work is: one changing line on a screen, few lines in a log.

    Args:
        last: whether the end is told too, be it after a moment.
    """

    def __init__(self, last: bool):
        self.last = last
        self.screen = sys.stderr.isatty()
        self.start = self.told = time.monotonic()
        self.count, self.open = 0, False

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Show that ``done`` of ``total`` (None: unknown) are done."""
        now = time.monotonic()
        self.count += 1
        if now - self.told < (0.2 if self.screen else 10) and not (self.last and done == total):
            return
        self.told = now
        each = (now - self.start) / self.count
        left = f', about {each * (total - done):.0f} s left' if total and done < total else ''
        line = f'{what} {done}{f" of {total}" if total else ""}, {each:.2f} s each{left}'
        self.open = self.screen
        print(f'\r{line:<78}' if self.screen else line, end='' if self.screen else '\n',
              file=sys.stderr, flush=True)

    def end(self) -> None:
        """Begin a new line on the screen."""
        if self.open:
            print(file=sys.stderr)
        self.open = False
