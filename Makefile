.PHONY: check lint format imports types test test-slow test-package test-shuffle test-ttsem stale bench bench-full
.PHONY: bench-gpu bench-compare report report-matrix

check: lint imports types stale test-package test  ## what CI runs, but for the checks of the GPU kernels below

lint:
	ruff check .
	ruff format --check .

format:
	ruff check --fix .
	ruff format .

imports:  ## which module may import which: the contracts in pyproject.toml
	lint-imports --no-cache --no-logo

types:
	mypy

test:  ## on all cores
	pytest

test-slow:  ## many more inputs for the fuzzers, every moment for kill -9; half an hour
	pytest -m slow

test-package:  ## builds the package, installs it on Python 3.10 and 3.13, and trains with it
	pytest -n 0 -m package

test-shuffle:  ## the GPU kernels in the interpreter, the programs of every launch in a random order
	pytest --program-order shuffle tests/kernels

test-ttsem:  ## the GPU kernels as Triton 3.8.0 compiles them, every access checked, on a CPU; makes its environment in build/
	tools/ttsem.sh

stale:  ## fails where tables and plots are not those of the committed results
	python -m benchmarks.report --check

bench:  ## small shapes with every provider; three minutes on 2 cores, writes nothing
	pytest benchmarks/

bench-full:  ## every provider of every operation, then its result file, tables and plots; about half an hour
	pytest benchmarks/ --full --results benchmarks/results
	python -m benchmarks.report

bench-compare:  ## fails where a median is 30 % above that of the last run saved on this machine, then saves this one
	pytest benchmarks/ --benchmark-autosave --benchmark-compare --benchmark-compare-fail=median:30%

bench-gpu:  ## GPU tests and headline benchmarks, 10 minutes
	python -m benchmarks.gpu benchmarks/results

report:  ## registers, spills and matrix instructions of every Triton kernel, without a GPU
	python -m tools.kernel_report --arch 80 90 100 gfx942

report-matrix:  ## the same under Triton 3.6.0, 3.8.0 and 3.9.0 for sm_80, sm_90 and sm_100; an hour on 2 cores
	tools/report_matrix.sh
