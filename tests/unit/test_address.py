"""Addresses: their secrets are shown nowhere."""

from __future__ import annotations

import pytest

from portrait_dist.errors import InputError
from portrait_dist.system.address import check_address, is_address, join, redact

ADDRESSES = {
    "https://bob:hunter2@host:8443/shards": "https://host:8443/shards",
    "http://token@host/shards": "http://host/shards",
    "https://bucket.s3.host/s?X-Amz-Signature=abc&X=1#part": "https://bucket.s3.host/s",
    "https://bob:p/w?x#y@host/s": "https://host/s",
    "http://bob:12345@host/": "http://host/",
    "s3://key:secret@bucket/dir/": "s3://bucket/dir/",
    "s3://bucket/portrait@2x/": "s3://bucket/portrait@2x/",
    "http://[::1]:8000/s?sig=1": "http://[::1]:8000/s",
    "https://host/s?a b=c d": "https://host/s",
    "filecache::https://bob:pw@host/s?sig=1": "filecache::https://host/s",
    "file:///data/shards": "file:///data/shards",
}


@pytest.mark.parametrize(("address", "shown"), ADDRESSES.items())
def test_user_names_passwords_queries_and_fragments_are_removed(address: str, shown: str) -> None:
    assert is_address(address)
    assert redact(address) == shown
    assert redact(redact(address)) == shown
    if " " not in address:
        assert redact(f"see {address} and /a?b") == f"see {shown} and /a?b"


@pytest.mark.parametrize(
    "text", ["/data/sh?rds", "shards#1", "a@b", "C:/x?", "", "what is 1 : // 2?"]
)
def test_paths_and_other_texts_stay_as_they_are(text: str) -> None:
    assert not is_address(text)
    assert redact(text) == text


@pytest.mark.parametrize(
    "address",
    [
        "http://[::1",
        "http:///shards",
        "http://host:99999/",
        "http://host\n/x",
        "http://host/\0",
        "https://bob:hunter2/secret@host:x/",
    ],
)
def test_a_malformed_address_is_refused_by_one_line_without_secrets(address: str) -> None:
    with pytest.raises(InputError, match=r"is not an address \(it") as caught:
        check_address(address)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_signature_stays_at_the_end_of_a_joined_address() -> None:
    assert join("https://host/dir/?sig=1", "a.tar") == "https://host/dir/a.tar?sig=1"
    assert join("s3://bucket/dir/", "a.tar") == "s3://bucket/dir/a.tar"
