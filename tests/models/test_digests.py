from __future__ import annotations

import pytest
import torch
import xxhash

from hf_rmt.models.digests import digest_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_digest_is_that_of_the_bytes(dtype: torch.dtype) -> None:
    values = torch.arange(12).to(dtype).view(3, 4)
    expected = xxhash.xxh3_128_hexdigest(values.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    assert digest_of(values) == expected
    assert digest_of(values.mT.contiguous().mT) == expected
    assert digest_of(values[:0]) == xxhash.xxh3_128_hexdigest(b"")


def test_what_was_hashed_can_be_resized_as_before() -> None:
    """FSDP2 frees what it has gathered by resizing its storage, which numpy's view of it would forbid."""
    values = torch.ones(4, 4)
    digest_of(values)
    values.untyped_storage().resize_(0)
    assert values.untyped_storage().nbytes() == 0
