"""The help text holds every field, and fits a terminal."""

from pydantic import BaseModel

from arcticjax.config import RunConfig, describe
from arcticjax.config.fields import field_names, place


def sections(model=RunConfig, seen=None):
    seen = {model} if seen is None else seen
    for field in model.model_fields.values():
        for found in _models(field.annotation):
            if found not in seen:
                seen.add(found)
                sections(found, seen)
    return seen


def _models(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in getattr(annotation, "__args__", ()) for m in _models(a)]


def test_describe_names_every_field_with_its_description():
    text = describe()
    flat = " ".join(text.split())
    count = 0
    for model in sections():
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"
            assert field.description in flat
            assert f"{name}: " in text
            count += 1
    assert count > 60
    for name in field_names():
        assert f"  {name}: " in text


def test_describe_gives_type_and_default():
    lines = [line.strip() for line in describe().splitlines()]
    assert "run.directory: non-empty text; required" in lines
    assert "loss.temperature: a number > 0; default 0.02" in lines
    assert "mesh.data: a whole number >= 1 or auto; default auto" in lines
    assert any(
        line.startswith("model.preset: xs | s | m | m-v1.5 | m-long | l |") for line in lines
    )
    assert "export.enabled: true or false; default true" in lines
    assert "data.sources.N.path: non-empty text; required" in lines


def test_describe_fits_100_columns():
    assert max(map(len, describe().splitlines())) <= 100


def test_place():
    found = place(("data", "sources", 0, "weight"))
    assert found is not None and found.expected == "a number > 0 or null"
    assert place(("data", "sources", "weight")) is None
    assert place(("data", "nothing")) is None
