"""Groups: videos that are not independent of each other, such as clips cut from one recording or of one person.

A group must be on one side of a split, since a model would otherwise be tested on what it has seen in training, and
confidence intervals draw groups, not videos. Groups come from the column `group` of a list. Without it, the file names
of Kinetics, UCF101 and HMDB51 say which recording a clip was cut from. '' is an unknown group.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping

# ID_START_END with times in whole seconds. An id may contain underscores itself, so it ends before the two times.
KINETICS_NAME = re.compile(r"(?P<origin>.+)_(?P<start>\d{6})_(?P<end>\d{6})")
# v_CLASS_gGG_cCC. The videos of a group gGG are cut from the same longer video.
UCF101_NAME = re.compile(r"v_(?P<origin>.+_g\d{2})_c\d{2}")
# FILM_CLASS, followed by HMDB51's tags: visible body part, camera motion, people, viewpoint, quality, number.
HMDB51_NAME = re.compile(r"(?P<origin>.+)_[hufl]_(?:cm|nm)_np\d_(?:fr|ri|le|ba)_(?:goo|med|bad)_\d+")


def origin_of(stem: str, label: str | None = None) -> str:
    """The longer video a file was cut from, by the naming rules of Kinetics, UCF101 and HMDB51; '' for other names.

    `label` is the class name, which HMDB51 includes in its file names.
    """
    for form in (KINETICS_NAME, UCF101_NAME):
        if match := form.fullmatch(stem):
            return match["origin"]
    match = HMDB51_NAME.fullmatch(stem)
    # Remove the class from FILM_CLASS, since one film has scenes of several classes. Some file names abbreviate the
    # class; the abbreviation then stays part of the origin.
    return match["origin"].removesuffix(f"_{label}") if match else ""


def group_of(name: str, label: str | None, listed: str) -> str:
    """The group of a video: the one that its list gives it or, without one, what its file name says."""
    return listed or origin_of(os.path.splitext(os.path.basename(name))[0], label)


def notes_on_shared_groups(train: str, groups: Mapping[str, Collection[str]]) -> list[str]:
    """A remark for each split that shares groups with the split `train`. groups: those of each split."""
    trained = set(groups.get(train, ())) - {""}
    notes = []
    for split, found in groups.items():
        if split != train and (shared := sorted(trained.intersection(found))):
            notes.append(
                f"{len(shared)} groups are in both {train} and {split}, such as {shared[0]!r}: accuracy on {split} is "
                "then too high; `python -m data_prep split` keeps groups together"
            )
    return notes
