"""Takes the clip out of a form, which is how `curl -F clip=@FILE` and HTML forms send a file (RFC 7578).

A form is a sequence of parts, each with a head of its own. Between them lies a delimiter, which the client chooses such
that it occurs in no part, and names in the Content-Type of the request:

    --B CRLF  Content-Disposition: form-data; name="clip"; filename="a.mp4" CRLF  CRLF  the clip  CRLF --B-- CRLF
"""

from __future__ import annotations

import mmap
import re
from email.message import Message
from typing import BinaryIO

MAX_PART_HEAD_BYTES = 8192
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,\-./:=? ]{1,70}")  # RFC 2046, section 5.1.1
_CHUNK_BYTES = 2**20


def form_boundary(content_type: str) -> str | None:
    """The boundary of a form's parts; None for any other type of content. Raises ValueError if it is missing."""
    message = Message()
    message["Content-Type"] = content_type
    if message.get_content_type() != "multipart/form-data":
        return None
    boundary = message.get_boundary()
    if boundary is None or not _BOUNDARY.fullmatch(boundary):
        raise ValueError("the form has no valid boundary")
    return boundary


def keep_first_part(file: BinaryIO, boundary: str) -> None:
    """Replace the form in an open file by the content of its first part. Raises ValueError if there is no such part."""
    delimiter = b"\r\n--" + boundary.encode("ascii")
    file.flush()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as form:
        opening = delimiter.removeprefix(b"\r\n") + b"\r\n"
        # The head of a part may be empty, so its end is searched from the end of the opening line on.
        head_end = form.find(b"\r\n\r\n", len(opening) - 2, MAX_PART_HEAD_BYTES)
        if form[: len(opening)] != opening or head_end < 0:
            raise ValueError("the form does not begin with a file")
        start = head_end + 4
        end = form.find(delimiter, start)
        if end < 0:
            raise ValueError("the form is incomplete")
    # Moved to the front chunk by chunk, since a clip may be larger than the memory that is free.
    for offset in range(start, end, _CHUNK_BYTES):
        file.seek(offset)
        chunk = file.read(min(_CHUNK_BYTES, end - offset))
        file.seek(offset - start)
        file.write(chunk)
    file.truncate(end - start)
    file.flush()
