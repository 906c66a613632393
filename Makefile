# The environment .venv is made and kept up to date from pyproject.toml; nothing else is needed
# beforehand than Python with its venv module.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help .venv demo peers gradients test slow lint clean
.NOTPARALLEL:

help:
	@echo "make .venv   the environment with everything that the tests need"
	@echo "make demo    the demonstration, with only what it needs"
	@echo "make peers   the environment .venv-peers with what the benchmarks compare against"
	@echo "make test    the tests"
	@echo "make slow    the tests that repeat others at length, with all optimizations"
	@echo "make gradients  the gradients beside those of the reference implementation"
	@echo "make lint    style, formatting and types"
	@echo "make clean   remove the environment and whatever was built"

.venv: .venv/.test

.venv/.created:
	$(PYTHON) -m venv .venv
	touch $@

# A stamp a set of extras, so that the demo does not install what only the tests need.
.venv/.demo .venv/.test: .venv/.%: .venv/.created pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[$*]'
	touch $@

# Other implementations have an environment of their own: the library never depends on them.
peers: .venv-peers/.installed

# acados is there for few platforms; where it is not, the studies say that it is absent.
.venv-peers/.installed: bench/peers/requirements.txt bench/peers/acados.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet -r bench/peers/requirements.txt
	rm -rf .venv-peers/acados
	.venv-peers/bin/python -m pip install --quiet --no-deps --target .venv-peers/acados \
		-r bench/peers/acados.txt || echo "acados is absent: see bench/peers/acados.txt"
	touch $@

gradients: .venv/.test
	$(BIN)/python -m bench gradients

demo: .venv/.demo
	$(BIN)/python -m jaxmpc.demo

# A process per core; what shares compiled programs stays together (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n auto --dist loadgroup --durations=15

test: .venv/.test
	$(PYTEST)

# Compiled as users do.
slow: .venv/.test
	$(PYTEST) -m slow --optimized

lint: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-peers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .cache demo_output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
