"""How the package is laid out, installed and imported."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_backend import python

ROOT = Path(__file__).parents[1]


def test_kernels_folder_is_no_package() -> None:
    """A top-level `kernels` would shadow the one that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_checkout_imports_fused_kernels_from_the_folder() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import fused.kernels.tuning as t, pathlib\n"
        "print(pathlib.Path(t.__file__).resolve())"
    )
    result = python(code)
    assert result.stdout.strip() == str(ROOT / "kernels" / "tuning.py"), result.stderr


def test_installation_imports_fused_kernels_from_any_folder(tmp_path) -> None:
    """In the environment of the README's commands this is the editable installation."""
    version = "from importlib.metadata import version; print(version('fused-backprop'))"
    installed = python(version, tmp_path)
    if "PackageNotFoundError" in installed.stderr:
        pytest.skip("fused-backprop is not installed")
    result = python("import fused.kernels.tuning, fused; print(fused.__version__)", tmp_path)
    assert result.stdout == installed.stdout, result.stderr


@pytest.mark.slow
def test_wheel_imports_fused_kernels_and_carries_the_names(tmp_path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*pip, "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("fused_backprop-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert "fused/kernels/cross_entropy.py" in names and "fused/py.typed" in names
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r})\n"
        "import fused.kernels.tuning, fused.makemore.data as d, torch\n"
        "print(d.load(None, 3, torch.device('cpu')).words, fused.kernels.tuning.__file__)"
    )
    result = python(code)
    assert result.stdout.startswith(f"5163 {tmp_path}"), result.stderr


def test_import_is_light() -> None:
    """Triton, the compiler, matplotlib and the application wait until they are needed."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import fused; new = set(sys.modules) - before\n"
        "print(sorted(m for m in new if not m.startswith('fused')))\n"
        "print(sorted(m for m in new if m.startswith('fused')))"
    )
    result = python(code)
    others, own = result.stdout.splitlines()
    for heavy in ("triton", "matplotlib", "torch._dynamo", "torch._inductor", "tqdm"):
        assert f"'{heavy}" not in others, others
    for lazy in ("makemore", "kernels", "reference"):
        assert f"'fused.{lazy}" not in own, own


@pytest.mark.slow
def test_import_costs_at_most_0_3_seconds_more_than_torch() -> None:
    code = (
        "import time, torch; t = time.perf_counter(); import fused; print(time.perf_counter() - t)"
    )
    assert min(float(python(code).stdout) for _ in range(3)) <= 0.3
