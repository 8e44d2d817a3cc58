# The book, its tests and its site. `make book` and `make test` need Python 3.10 or later and the package registries, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
IMAGE := tests/data/guests/linux-4level
TEXT := 0xffffffff92c00000
WORKERS ?= auto
MADE_FROM := constraints.txt settings.ini setup.py pyproject.toml
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
FRESH := $(shell for file in $(MADE_FROM); do [ $(READY) -nt $$file ] || exit; done; echo yes)

.NOTPARALLEL:   # each step reads what the one before wrote
.PHONY: book test lab site bench verdicts theorem mutants env export execute claims readme sync check serve system clean

book: env export claims execute readme site ## build everything, then walk a real guest
	@echo; echo "A real guest, $(IMAGE): what its kernel may execute, and how it fetches the first byte of its text."
	@echo; $(BIN)/kvm-mmu map $(IMAGE) --ranges --flags x-u
	@echo; $(BIN)/kvm-mmu explain $(IMAGE) $(TEXT) --supervisor --fetch
	@echo; echo "And why it may not write there:"
	@$(BIN)/kvm-mmu explain $(IMAGE) $(TEXT) --supervisor --write; test $$? = 1
	@echo; echo "The site is in _docs/: open _docs/index.html, or run 'make serve' to have the live figures too."

test: env system ## every test
	@sh tools/system.sh spin gcc libc6-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests

env: $(READY) ## the virtual environment
	@$(if $(FRESH),echo "skip  environment: nothing it is made from changed",:)
$(READY): $(MADE_FROM)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or later is needed; set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || sh tools/system.sh python3-venv
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "environment ready: $(VENV)"

system: ## Debian packages that pictures, the site and its tests need
	@sh tools/system.sh graphviz chromium npm

export: $(READY) ## notebooks -> kvm_mmu_lit/
	@$(BIN)/python tools/export.py
execute: $(READY) system ## run the notebooks whose inputs changed
	@$(BIN)/python tools/notebooks.py
claims: $(READY) ## notebooks -> tests/claims/
	@$(BIN)/python tools/claims.py
readme: $(READY) ## nbs/index.ipynb -> README.md
	@$(BIN)/python tools/readme.py
site: $(READY) system ## notebooks -> _docs/
	@$(BIN)/python -m tools.site
serve: site ## the site on loopback, live figures included
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs 8000
lab: $(READY) ## JupyterLab on the book; notebooks are saved clean
	$(BIN)/jupyter lab $(AS_ROOT) --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter nbs
bench: $(READY) ## speed and memory, beside volatility3 and SPIN and of the whole machine, up to a million pages; half an hour; BENCH=--record writes it down
	@sh tools/system.sh spin gcc libc6-dev
	$(BIN)/python -c 'import sys; from kvm_mmu_lit.evidence.benchmarks import main; main(sys.argv[1:])' $(BENCH)
	$(BIN)/python -c 'import sys; from kvm_mmu_lit.evidence.exploring_speed import main; main(sys.argv[1:])' $(BENCH)
	$(BIN)/python -c 'import sys; from kvm_mmu_lit.evidence.machine_speed import main; main(sys.argv[1:])' $(BENCH)
	$(BIN)/python -c 'import sys; from kvm_mmu_lit.evidence.machine_growth import main; main(sys.argv[1:])' $(BENCH)
verdicts: $(READY) ## search every world of the review under every design, minutes; writes nbs/review/verdicts.json
	$(BIN)/python -c 'from kvm_mmu_lit.review.recorded import main; main(["nbs/review/verdicts.json"])'
theorem: $(READY) ## random stories over every setting; THEOREM="--steps 1000000 --seed 7 --jobs 2" for more
	$(BIN)/python tools/theorem.py $(THEOREM)
mutants: $(READY) ## make known mistakes, one at a time: is each seen? Minutes; writes nbs/review/mutants.json
	$(BIN)/python tools/mutants.py $(MUTANTS)
sync check: $(READY) ## fail if exporting, extracting or cleaning would change the tree
	@$(BIN)/python tools/sync.py
clean: ## remove what can be made again
	rm -rf _docs _site_src .cache build dist *.egg-info
