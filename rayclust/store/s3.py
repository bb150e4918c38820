"""S3 by s3fs, with one layer of retries, bodies with their ETag and listings by the page added."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from fsspec.asyn import sync, sync_wrapper
from s3fs import S3FileSystem

from rayclust.store.failures import ExhaustedError, names, retry

logger = logging.getLogger(__name__)

PART_BYTES = 32 << 20
"""Bytes of a part of an upload; objects of less than two parts are put at once."""

PAGE_KEYS = 1000
"""Keys of a page of a listing, S3's own bound."""

_SETTINGS: dict[str, Any] = {
    "connect_timeout": 10,
    "read_timeout": 30,
    "max_pool_connections": 64,
    # Requests are made again in one place, `retry`: layers of retries multiply into hours of a hang.
    "retries": {"mode": "standard", "total_max_attempts": 1},
}


@functools.lru_cache(maxsize=4)
def connect(pid: int, variables: tuple[tuple[str, str], ...]) -> S3:
    """Return a process's connection, made anew when an AWS variable changes; credentials come from the AWS chain.

    Raises:
        ValueError: the endpoint holds a login, which requests to S3 can't use and logs would show.
    """
    settings = dict(variables)
    payer = settings.get("AWS_REQUEST_PAYER", "").lower()
    connection = S3(
        anon=settings.get("AWS_NO_SIGN_REQUEST", "").lower() in {"1", "true", "yes"},
        s3_additional_kwargs={"RequestPayer": "requester"} if payer == "requester" else {},
        config_kwargs=_SETTINGS,
        use_listings_cache=False,  # another worker may have written since
        skip_instance_cache=True,
    )
    connection.connect()
    if "@" in urlsplit(connection.s3.meta.endpoint_url).netloc:
        raise ValueError("the endpoint's address holds a login; credentials come from the AWS variables and files")
    return connection


class S3(S3FileSystem):  # type: ignore[misc]
    """A connection to S3 or a compatible store, shared by the threads of a process."""

    retries = 1

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._call_s3 = retry(super()._call_s3)
        self._get_object = retry(self._get_object_once)
        self.get_object = sync_wrapper(self._get_object, self)

    async def _get_object_once(
        self, path: str, start: int = 0, end: int | None = None, etag: str = ""
    ) -> tuple[bytes, str]:
        """Return bytes of an object and its ETag, of one request, so that they belong together.

        Args:
            path: bucket/key.
            start: first byte.
            end: the byte behind the last, or None.
            etag: that the object must have.
        """
        # s3fs sends a request again, but does not read again where the body breaks off.
        bucket, _, key = path.partition("/")
        request = {"IfMatch": etag} if etag else {}
        if start or end is not None:
            request["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        answer = await super()._call_s3("get_object", Bucket=bucket, Key=key, **request)
        try:
            body = await answer["Body"].read()
        finally:
            answer["Body"].close()
        if len(body) != answer["ContentLength"]:
            raise ConnectionError(f"the body broke off after {len(body)} of {answer['ContentLength']} bytes")
        return body, str(answer.get("ETag", ""))

    async def _pipe_file(self, path: str, data: bytes, mode: str = "overwrite", **condition: Any) -> dict[str, Any]:
        """Write an object, from two parts on by an upload that appears when it is complete; return its ETag."""
        bucket, _, key = path.partition("/")
        answer: dict[str, Any]
        if len(data) < 2 * PART_BYTES:
            condition |= {"IfNoneMatch": "*"} if mode == "create" else {}
            answer = await self._call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
            return answer
        # 1. Abort the uploads that killed writers of the object left: they are paid for and never seen.
        try:
            listed = await self._call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key)
            for found in listed.get("Uploads") or ():
                if found["Key"] == key:
                    await self._abort_mpu(bucket, key, found["UploadId"])
        except (OSError, ExhaustedError) as error:  # a store that cannot list them is no error
            logger.debug("s3://%s/%s: forgotten uploads are not aborted: %s", bucket, key, error)
        # 2. Upload the parts.
        try:
            await super()._pipe_file(path, data, chunksize=PART_BYTES, max_concurrency=4)
        except FileNotFoundError as error:
            # The last request, sent again after its answer was lost, finds no upload because the object is there.
            if "NoSuchUpload" not in names(error) or (await self._get_object(path))[0] != data:
                raise
        answer = await self._call_s3("head_object", Bucket=bucket, Key=key)
        return answer

    def list_objects(self, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield path and properties of every object below bucket/folder by order of keys, with one page in memory."""
        bucket, _, folder = path.partition("/")
        request = {"Bucket": bucket, "Prefix": f"{folder}/" if folder else "", "MaxKeys": PAGE_KEYS}
        while True:
            page = sync(self.loop, self._call_s3, "list_objects_v2", **request)
            for found in page.get("Contents", ()):
                yield f"{bucket}/{found['Key']}", {"size": found["Size"], "ETag": found.get("ETag", "")}
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]
