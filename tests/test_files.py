"""Files that are replaced in one step."""

import os
from pathlib import Path

import pytest

from stagedspec.kernels.common.files import replacing, write_text


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_changes_in_one_step_or_not_at_all(tmp_path, shared):
    path = tmp_path / "a.json"
    write_text(path, "old", shared)
    with replacing(path, shared) as part:
        part.write_text("ü", encoding="utf-8")
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "ü"
    with pytest.raises(KeyboardInterrupt), replacing(path, shared) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "ü" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_permissions_stay(tmp_path, mode):
    path = tmp_path / "a.json"
    write_text(path, "old")
    path.chmod(mode)
    with replacing(path) as part:
        assert part.stat().st_mode & 0o077 == 0
        part.write_text("new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == mode


def test_writers_of_a_shared_file_do_not_meet(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    path = tmp_path / "a.json"
    with replacing(path, shared=True) as ours:
        ours.write_text("ours")
        with ThreadPoolExecutor(1) as other:
            other.submit(write_text, path, "theirs", True).result()
        assert path.read_text() == "theirs"
    assert path.read_text() == "ours" and list(tmp_path.iterdir()) == [path]


def test_links_and_devices_stay_what_they_are(tmp_path):
    target, link = tmp_path / "a.json", tmp_path / "link.json"
    link.symlink_to(target)
    for text in ("new", "newer"):
        write_text(link, text)
        assert link.is_symlink() and target.read_text() == text
    write_text(Path(os.devnull), "text")
    assert Path(os.devnull).is_char_device()
