"""Parameters of a domain's own part of embedding and head."""

from __future__ import annotations

from families import (
    FAMILIES,
    SPACE,
    partition_of,
)

from sgtm.model.domain_parts import domain_parts


def test_names_and_keys():
    config = FAMILIES["llama"]
    partition = partition_of(SPACE, config, forget_heads=2, forget_neurons=1, embedding=4)
    tied = domain_parts(partition, 41, 16, True)
    assert [(p.name, p.shape, p.key) for p in tied] == [
        ("embedding_1_rows", (41, 4), "embedding.bio"),
        ("embedding_1_basis", (4, 16), "embedding.bio"),
        ("embedding_2_rows", (41, 4), "embedding.code"),
        ("embedding_2_basis", (4, 16), "embedding.code"),
    ]
    assert {p.key for p in domain_parts(partition, 41, 16, False)} == {
        "embedding.bio", "embedding.code", "head.bio", "head.code",
    }  # fmt: skip
    assert domain_parts(partition_of(SPACE, config, forget_heads=2, forget_neurons=1), 41, 16, True) == []
