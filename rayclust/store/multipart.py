"""Puts of objects of any size: at once, or in parts that appear together when all have arrived, or not at all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from botocore import exceptions as aws

from rayclust.store.connection import call
from rayclust.store.patience import ExhaustedError, codes

logger = logging.getLogger(__name__)

PART_BYTES = 32 << 20
"""Bytes of a part, and of the largest object that is put at once."""
MOST_PARTS = 10_000
"""S3's own bound."""
PARTS_AT_ONCE = 4


def put(bucket: str, key: str, size: int, read: Callable[[int, int], bytes]) -> str:
    """Writes an object.

    Args:
        bucket: its name.
        key: of the object.
        size: bytes of the content.
        read: gives the bytes from a start up to an end; may be called from several threads, and again.

    Returns:
        The object's ETag.
    """
    if size <= PART_BYTES:
        return str(call("put_object", Bucket=bucket, Key=key, Body=read(0, size)).get("ETag", ""))
    part = max(PART_BYTES, -(-size // MOST_PARTS))
    with _upload(bucket, key) as upload, ThreadPoolExecutor(PARTS_AT_ONCE) as threads:
        place = {"Bucket": bucket, "Key": key, "UploadId": upload}

        def send(start: int) -> str:
            body = read(start, min(start + part, size))
            return str(call("upload_part", **place, PartNumber=start // part + 1, Body=body)["ETag"])

        etags = list(threads.map(send, range(0, size, part)))
        return _complete(place, etags, size)


@contextmanager
def _upload(bucket: str, key: str) -> Iterator[str]:
    """An upload in parts that is called off unless it is completed; parts left lying are paid for, and never seen."""
    _call_off_forgotten(bucket, key)
    upload = str(call("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"])
    try:
        yield upload
    except BaseException:
        _call_off(bucket, key, upload)
        raise


def _call_off_forgotten(bucket: str, key: str) -> None:
    """Calls off what a writer of the same object left when it was killed; a store that cannot tell is no error."""
    try:
        listed = call("list_multipart_uploads", Bucket=bucket, Prefix=key)
    except (OSError, aws.BotoCoreError, aws.ClientError, ExhaustedError) as error:
        logger.debug("s3://%s/%s: uploads in parts are not listed: %s", bucket, key, error)
        return
    for found in listed.get("Uploads") or ():
        if found["Key"] == key:
            _call_off(bucket, key, found["UploadId"])


def _call_off(bucket: str, key: str, upload: str) -> None:
    try:
        call("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
    except (OSError, aws.BotoCoreError, aws.ClientError, ExhaustedError) as error:
        logger.debug("s3://%s/%s: an upload in parts is not called off: %s", bucket, key, error)


def _complete(place: dict[str, Any], etags: list[str], size: int) -> str:
    parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, start=1)]
    try:
        return str(call("complete_multipart_upload", **place, MultipartUpload={"Parts": parts}).get("ETag", ""))
    except (OSError, aws.ClientError) as error:
        if "NoSuchUpload" not in codes(error):
            raise
        # Sent again after its answer was lost: the upload is no more because the object is there.
        found = call("head_object", Bucket=place["Bucket"], Key=place["Key"])
        if int(found["ContentLength"]) != size or not str(found["ETag"]).strip('"').endswith(f"-{len(etags)}"):
            raise
        return str(found["ETag"])
