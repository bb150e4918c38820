"""What went wrong with an `s3://` URI, as one line that says what to do and holds no secret."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from botocore import exceptions as aws

from rayclust.errors import DataError
from rayclust.store.patience import ExhaustedError, codes
from rayclust.store.storage import MissingError, UnreadableError

SCHEME = "s3://"
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_ACCESS_KEY_ID")
_LOGIN = re.compile(r"//[^/@\s]*@")


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of an `s3://` URI.

    Raises:
        DataError: there is no bucket in it, or a login.
    """
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if "@" in bucket or ":" in bucket:  # not repeated in the message: it may hold a secret
        raise DataError("s3://…@…: a bucket's name holds no login; credentials come from the AWS variables and files")
    if not bucket:
        raise DataError(f"{uri}: names no bucket; write s3://bucket/path")
    return bucket, key


@contextmanager
def translated(uri: str, action: str) -> Iterator[None]:
    """Makes every error inside one of rayclust's; see `translate`."""
    try:
        yield
    except (DataError, GeneratorExit):
        raise
    except (OSError, aws.BotoCoreError, aws.ClientError, ValueError, ExhaustedError) as error:
        raise translate(error, uri, action) from error


def translate(error: Exception, uri: str, action: str) -> DataError:
    """The one line that tells a user why a bucket could not be used.

    Args:
        error: what s3fs, botocore or the network raised, or that patience ran out over it.
        uri: the object or folder.
        action: the verb that failed: read, write, list, remove.
    """
    if isinstance(error, ExhaustedError) and isinstance(error.__cause__, Exception):
        found = translate(error.__cause__, uri, action)
        return type(found)(f"{found} ({error})")
    bucket = split(uri)[0]
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{uri}: no such object or bucket; check the path, the region and that {bucket} exists")
    if "RequestTimeTooSkewed" in codes(error):
        return DataError(f"{uri}: cannot {action}: this machine's clock and the store's differ too much; set the clock")
    if "412" in codes(error):
        return UnreadableError(f"{uri}: changed while it was read; run again when it is at rest")
    if isinstance(error, PermissionError):
        return UnreadableError(
            f"{uri}: access denied to {action}: {_line(error)}; check the credentials and bucket policy"
        )
    if isinstance(error, aws.NoCredentialsError | aws.PartialCredentialsError | aws.CredentialRetrievalError):
        credentials = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        return DataError(f"{uri}: no AWS credentials found; {credentials} (AWS_NO_SIGN_REQUEST=1 reads public buckets)")
    if isinstance(error, aws.ProfileNotFound):
        return DataError(f"{uri}: {_line(error)}; check AWS_PROFILE and the AWS config file")
    if isinstance(error, aws.ConnectionError | aws.HTTPClientError | ConnectionError | TimeoutError):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        where = f"the endpoint {without_secrets(endpoint)}" if endpoint else "the S3 endpoint"
        return DataError(
            f"{uri}: cannot reach {where}: {_line(error)}; check AWS_ENDPOINT_URL, AWS_REGION and the network"
        )
    return DataError(f"{uri}: cannot {action}: {_line(error)}")


def without_secrets(text: str) -> str:
    """`text` without the values of the AWS variables that are secret, and without logins in URLs."""
    for name in _SECRETS:
        value = os.environ.get(name, "")
        if len(value) >= 8:  # a shorter one, of a mock, is part of other words
            text = text.replace(value, f"<{name}>")
    return _LOGIN.sub("//", text)


def _line(error: Exception) -> str:
    return without_secrets(" ".join(str(error).split())) or type(error).__name__
