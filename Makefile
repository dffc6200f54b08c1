.PHONY: check lint format types test bench report

check: lint types test  ## what CI runs

lint:
	ruff check .
	ruff format --check .

format:
	ruff check --fix .
	ruff format .

types:
	mypy

test:
	pytest

bench:  ## training step and encode against dense PyTorch; ratios at the end
	pytest benchmarks/

report:  ## registers, spills and matrix instructions of every Triton kernel, without a GPU
	python -m fastsae_kernels.report --arch 80 90 100 gfx942
