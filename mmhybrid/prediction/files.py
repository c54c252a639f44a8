"""Results as files: pictures, videos, COCO's JSON, masks, and labels for annotation tools."""
from __future__ import annotations

import errno
import io
import json
import os
import os.path as osp
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from mmhybrid import __version__
from mmhybrid.errors import NO_WRITING, UserError

from .outlines import joined, outlines
from .results import Detection, Result, Segmentation, decoded, run_lengths
from .sources import PLACES, RESULTS, Item

__all__ = ['KINDS', 'NotWritten', 'Results', 'check_apart', 'new_folder']

#: What ``--write`` takes, beside the JSON that is always there.
KINDS = ('pictures', 'masks', 'yolo', 'labelme')


class NotWritten(UserError):
    """A file of results cannot be written, so that going on makes no sense."""


def new_folder(name: str) -> Path:
    """Make a folder of that name, or with a number behind it; no other process gets the same.

    Raises:
        NotWritten: if none can be made.
    """
    number = 1
    while True:
        folder = Path(name if number == 1 else f'{name}-{number}')
        with _told(folder), suppress(FileExistsError):
            folder.mkdir()
            return folder
        number += 1


def check_apart(folder: Path, items: Sequence[Item]) -> None:
    """Raise UserError if results would take the place of what is looked at."""
    ours = [osp.join(osp.realpath(folder), name, '') for name in PLACES]
    for item in items:
        if item.kind in ('image', 'video') and osp.realpath(item.path).startswith(tuple(ours)):
            raise UserError(f'{item} lies where --out {folder} would write, so that results could '
                            'take its place. Name another folder.')


class Results:
    """Writes what was found, each file whole or not at all.

    Args:
        folder: where everything goes; made when the first file is written.
        kinds: some of :data:`KINDS`.
        names: of all classes.

    Raises:
        UserError: without the package pycocotools.
    """

    def __init__(self, folder: Path, kinds: Sequence[str], names: Sequence[str]):
        run_lengths()  # rather now than after the first picture
        self.folder, self.kinds, self.names = folder, kinds, names
        self.images: list[dict] = []
        self.annotations: list[dict] = []
        self._taken: set[str] = set()
        self._films: dict[str, _Film] = {}

    def stem(self, name: str) -> str:
        """A name for the files of a picture: without suffix, and no other's."""
        stem, suffix = osp.splitext(name)
        safe = '/'.join(part for part in Path(stem).parts if part not in ('..', '/', os.sep))
        number, found = 1, safe
        while found.lower() in self._taken:  # some systems know no difference of upper and lower
            number += 1
            found = f'{safe}_{suffix[1:]}' if number == 2 else f'{safe}_{number}'
        self._taken.add(found.lower())
        return found

    def add(self, name: str, stem: str, result: Result, image: np.ndarray,
            film: tuple[str, float] | None = None, source: str | None = None) -> None:
        """Write what was found in one picture.

        Args:
            name: of the picture, for the JSON.
            stem: of :meth:`stem`, for files.
            result: what was found.
            image: the picture, (H, W, 3) uint8 RGB.
            film: the stem of the video that the drawn picture goes to, and its rate; None makes it
                a file of its own.
            source: path of the picture, if it is a file.

        Raises:
            NotWritten: if a file cannot be written.
        """
        if 'pictures' in self.kinds:
            drawn = result.plot(image, enlarge=film is None)
            if film is None:
                self._write(f'pictures/{stem}.jpg', _image(drawn, format='JPEG', quality=92))
            else:
                self._film(*film, np.asarray(drawn))
        if 'masks' in self.kinds:
            self._write(f'masks/{stem}.png', _image(result.to_image(), format='PNG'))
        if 'yolo' in self.kinds:
            self._write(f'labels/{stem}.txt', _yolo(result).encode())
        if 'labelme' in self.kinds:
            path = f'labelme/{stem}.json'
            shown = name if source is None else osp.relpath(source, (self.folder / path).parent)
            self._write(path, _json(_labelme(result, shown)))
        height, width = result.size
        image_id = len(self.images) + 1
        self.images.append(dict(id=image_id, file_name=name, width=width, height=height))
        for each in result.to_coco(image_id):
            self.annotations.append(dict(id=len(self.annotations) + 1, **each))

    def close(self) -> None:
        """End videos, and write what belongs to all pictures.

        Raises:
            NotWritten: if that is not possible.
        """
        films, self._films = self._films, {}
        problems = [problem for problem in map(_Film.close, films.values()) if problem]
        if 'yolo' in self.kinds:
            names = '\n'.join(f'  {number}: {json.dumps(name, ensure_ascii=False)}'
                              for number, name in enumerate(self.names))
            self._write('data.yaml', f'path: .\nnames:\n{names}\n'.encode())
        self._write(RESULTS, _json(dict(
            info=dict(description=f'predictions of mmhybrid {__version__}'), images=self.images,
            annotations=self.annotations, categories=[
                dict(id=number, name=name) for number, name in enumerate(self.names, start=1)])))
        if problems:
            raise NotWritten(' '.join(problems))

    def end_film(self, stem: str) -> None:
        """End one video; see :meth:`close`."""
        problem = self._films.pop(stem).close() if stem in self._films else None
        if problem:
            raise NotWritten(problem)

    def _film(self, stem: str, rate: float, image: np.ndarray) -> None:
        if stem not in self._films:
            path = self.folder / 'videos' / f'{stem}.mp4'
            with _told(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._films[stem] = _Film(path, rate, image.shape[:2])
        self._films[stem].add(image)

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        part = path.with_name(f'.{path.name}.part')
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_bytes(content)
                os.replace(part, path)
            finally:
                with suppress(OSError):
                    part.unlink()  # absent after success


class _told:
    """Turns an error of the system into one that says which file could not be written."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError):
            advice = ('Free some space, or write elsewhere with --out FOLDER.'
                      if error.errno in (*NO_WRITING, errno.EFBIG) else
                      'Correct its permissions, or write elsewhere with --out FOLDER.')
            raise NotWritten(f'{self.path} could not be written: {error.strerror or error}. '
                            f'{advice}') from error


class _Film:
    """A video that is being written."""

    def __init__(self, path: Path, rate: float, size: tuple[int, int]):
        import cv2
        self.path, self.size, self.written = path, size, 0
        self.video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), rate, size[::-1])
        if not self.video.isOpened():
            raise OSError(0, 'OpenCV has no encoder for mp4 here, or the folder cannot be written')

    def add(self, image: np.ndarray) -> None:
        self.video.write(np.ascontiguousarray(image[..., ::-1]))
        self.written += 1

    def close(self) -> str | None:
        """End the file; returns what is wrong with it, as OpenCV does not tell."""
        import cv2
        self.video.release()
        again = cv2.VideoCapture(str(self.path))
        there = int(again.get(cv2.CAP_PROP_FRAME_COUNT)) if again.isOpened() else 0
        again.release()
        if there >= self.written:
            return None
        return (f'{self.path} could not be written whole ({there} of {self.written} pictures). '
                'Free some space, or write elsewhere with --out FOLDER.')


def _image(picture, **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, **options)
    return content.getvalue()


def _json(content: dict) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()


# --- labels for annotation tools ------------------------------------------------------------------

def _objects(result: Result):
    """Label, box and mask (None without) of each object; a segmentor's are its classes."""
    if isinstance(result, Segmentation):
        for label in result.present:
            yield label, None, result.map == label
    else:
        masks = [None] * len(result) if result.rles is None else map(decoded, result.rles)
        yield from zip(result.labels.tolist(), result.boxes.tolist(), masks, strict=True)


def _yolo(result: Result) -> str:
    """Lines of YOLO: the label, and the box or the outline in parts of the picture's sides."""
    height, width = result.size
    lines = []
    for label, box, mask in _objects(result):
        if mask is None:
            left, top, right, bottom = box
            values = ((left + right) / 2 / width, (top + bottom) / 2 / height,
                      (right - left) / width, (bottom - top) / height)
        else:
            parts = outlines(mask)
            if not parts:
                continue
            # Regions are told apart by their parts; an object is one line.
            for part in parts if isinstance(result, Segmentation) else [joined(parts)]:
                lines.append(_line(label, (np.array(part) / (width, height)).ravel()))
            continue
        lines.append(_line(label, values))
    return ''.join(lines)


def _line(label: int, values) -> str:
    return f'{label} {" ".join(f"{min(max(value, 0), 1):.6f}" for value in values)}\n'


def _labelme(result: Result, path: str) -> dict:
    height, width = result.size
    shapes = []
    for number, (label, box, mask) in enumerate(_objects(result)):
        found = [('polygon', part) for part in outlines(mask)] if mask is not None else [
            ('rectangle', [[round(side, 2) for side in box[:2]],
                           [round(side, 2) for side in box[2:]]])]
        score = float(result.scores[number]) if isinstance(result, Detection) else None
        for kind, points in found:
            shapes.append(dict(
                label=result.names[label], points=points, shape_type=kind, flags={},
                group_id=number if len(found) > 1 else None,
                description='' if score is None else f'{score:.2f}'))
    return dict(version='5.5.0', flags={}, shapes=shapes, imagePath=path, imageData=None,
                imageHeight=height, imageWidth=width)
