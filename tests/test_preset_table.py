"""The list of presets in the file is the one that building them gives."""

from exactflow.cli.preset_table import counted, digest, listed
from exactflow.models import registry

REMEDY = "python -m exactflow.cli.preset_table"


def test_the_table_is_of_these_configurations() -> None:
    """Building all takes half a minute, so only the configurations are compared."""
    table = listed()
    assert list(table) == registry.names(), REMEDY
    for name, row in table.items():
        assert row.config == digest(name), f"{name}: {REMEDY}"
        assert row.published == registry.preset(name).published, f"{name}: {REMEDY}"


def test_the_smallest_of_every_family_is_counted_as_it_is_built() -> None:
    table = listed()
    for family in registry.FAMILIES.values():
        name = min(family.presets, key=lambda name: table[name].parameters)
        assert table[name] == counted(name), f"{name}: {REMEDY}"


def test_a_changed_preset_is_noticed() -> None:
    digests = {digest(name) for name in registry.names()}
    configs = {(registry.family_of(n).model.kind, registry.preset(n).config) for n in listed()}
    assert len(digests) == len(configs)
