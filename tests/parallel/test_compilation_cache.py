"""Where compiled programs are kept, who may write there, and that they are found again."""

import logging
import stat

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as of_jax

from arcticjax.errors import ConfigError
from arcticjax.parallel.compilation_cache import keep_compiled

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    """No cache is set; what a test sets is taken back."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    of_jax.reset_cache()


def test_users_cache_is_private(tmp_path):
    folder = keep_compiled("auto")
    assert folder is not None and folder.parent == tmp_path / "user" / "arcticjax" / "compiled"
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert keep_compiled("auto") == folder


def test_programs_are_found_again(tmp_path):
    folder = keep_compiled(str(tmp_path / "given"))
    assert folder is not None and folder.parent == tmp_path / "given"
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    of_jax.reset_cache()
    ones = jnp.ones(7)  # its program is another; it may have been compiled before
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))

    def program(x):
        return jnp.sin(x) + 12.75

    jax.jit(program)(ones)
    assert any(folder.iterdir())
    events.clear()
    jax.clear_caches()
    jax.jit(program)(ones)
    assert "/jax/compilation_cache/cache_hits" in events
    assert "/jax/compilation_cache/cache_misses" not in events


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache:UserWarning")
def test_a_damaged_program_is_compiled_anew(tmp_path):
    folder = keep_compiled(str(tmp_path / "given"))
    assert folder is not None
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    of_jax.reset_cache()
    threes = jnp.full(5, 3.0)

    def program(x):
        return x * 2.5 + 1.25

    jax.jit(program)(threes)
    damaged = [file for file in folder.rglob("*") if file.is_file()]
    for file in damaged:
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
    assert damaged
    jax.clear_caches()
    assert (jax.jit(program)(threes) == 8.75).all()


def test_a_folder_that_others_write_to_is_refused(tmp_path, caplog):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o770)
    before = jax.config.jax_compilation_cache_dir
    with pytest.raises(ConfigError, match=r"others can write to .*shared.*chmod 700"):
        keep_compiled(str(shared))
    users = tmp_path / "user" / "arcticjax" / "compiled"
    users.mkdir(parents=True)
    users.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert keep_compiled("auto") is None
    assert "are not kept: " in caplog.text and "others can write" in caplog.text
    assert jax.config.jax_compilation_cache_dir == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.compilation_cache: .*file/below cannot be used"):
        keep_compiled(str(tmp_path / "file" / "below"))


def test_none_and_the_environment_go_before(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    assert keep_compiled("none") is None
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "theirs"))
    assert keep_compiled(str(tmp_path / "ours")) is None
    assert jax.config.jax_compilation_cache_dir == before
    assert not (tmp_path / "ours").exists()
