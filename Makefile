# Everything a reader or CI does; plain `make` lists it. GNU's and BSD's make both read this file.

SCALE ?= digits
JOBS ?=
ONLY ?=
# The studies beyond the paper: published takes their runs from published/, trained trains them too.
# Empty: published for the digits, trained for the other scales.
STUDIES ?=
PYTHON ?= python3
# Versions that the kit was tested with; make PINS= … takes the newest that pyproject.toml allows.
PINS ?= constraints.txt

VENV = .venv
BIN = $(VENV)/bin
LINTED = kdiga_nb tests notebooks benchmarks
# What a test run draws stays apart from what a reproduction drew.
ASIDE = KDIGA_FIGURES="$$PWD/build/test-figures"
INSTALL = @PYTHON="$(PYTHON)" VENV="$(VENV)" PINS="$(PINS)" .ci/install

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' Makefile

.PHONY: help reproduce explore page site test bench notebooks publish constraints lab clean

reproduce: $(VENV)/.installed ## Make every figure and table: SCALE=digits STUDIES=published|trained JOBS=processes ONLY="names"
	jobs="$(JOBS)"; only="$(ONLY)"; studies="$(STUDIES)"; \
		if [ "$$studies" = trained ]; then $(BIN)/kdiga store drop $(SCALE); fi; \
		if [ -z "$$studies" ] && [ $(SCALE) = digits ]; then studies=published; fi; \
		$(BIN)/kdiga reproduce --scale $(SCALE) $${studies:+--studies "$$studies"} $${jobs:+--jobs "$$jobs"} \
			$${only:+--only $$only}

explore: $(VENV)/.installed ## Open the explorer in JupyterLab, on the published nets until you have your own
	$(BIN)/kdiga explore

page: $(VENV)/.installed-page ## Serve the explorer as a page, without code (installs Voilà)
	$(BIN)/kdiga explore --page

# The notebooks are checked last. Their runs come from runs/, the store of `make reproduce`. What the store lacks is made
# first, in parallel; the studies' runs are the published ones. pytest names every test that it skipped, with the reason
# (-ra in pyproject.toml). pytest's filters turn warnings into errors, which suits the unit tests but not the libraries
# that run notebooks.
test: $(VENV)/.installed-test ## Lint, type-check and test the package, then run the notebooks and compare what they claim
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2
	jobs="$(JOBS)"; $(ASIDE) $(BIN)/kdiga reproduce --scale digits --studies published --no-notebooks --jobs "$${jobs:-2}"
	$(ASIDE) $(BIN)/python -m pytest -n 2 --dist loadfile -W default \
		--nbval-lax --nbval-current-env --nbval-cell-timeout 900 notebooks/

site: $(VENV)/.installed-site ## The notebooks, documents, API and the explorable page as web pages in site/
	$(BIN)/kdiga site site

bench: $(VENV)/.installed-bench ## Measure steps, memory, attacks beside their peers, the explorer, a reproduction: benchmarks/results/
	$(BIN)/kdiga reproduce --only explore  # the explorer is timed on points that the store has
	$(BIN)/python benchmarks

notebooks: $(VENV)/.installed ## Execute the committed notebooks in place, at their defaults
	$(BIN)/jupyter-nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \
		--ExecutePreprocessor.store_widget_state=False notebooks/*.ipynb

publish: ## For maintainers: copy figures/SCALE to published/SCALE
	mkdir -p published/$(SCALE)
	cp figures/$(SCALE)/*.csv figures/$(SCALE)/*.json figures/$(SCALE)/*.png published/$(SCALE)/
	if [ "$(SCALE)" = digits ]; then $(BIN)/kdiga explorable published/digits/explorable.html; fi

constraints: $(VENV)/.installed-test ## For maintainers: write the versions of .venv to constraints.txt
	{ echo "# Tested together; make writes this file: make PINS= test && make constraints"; \
	  $(BIN)/python -m pip freeze --exclude-editable | grep '==' | grep -viE '^(nvidia|cuda|triton|setuptools|wheel)' \
	  | sed 's/+[a-z0-9.]*$$//'; } > constraints.txt

lab: $(VENV)/.installed ## Open JupyterLab here
	$(BIN)/jupyter-lab

clean: ## Remove .venv, build/ and caches; runs/, data/ and figures stay
	rm -rf $(VENV) build .pytest_cache .ruff_cache *.egg-info
	find $(LINTED) -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml
	$(INSTALL) '.' $@

$(VENV)/.installed-bench: pyproject.toml
	$(INSTALL) '.[bench]' $@

$(VENV)/.installed-page: pyproject.toml
	$(INSTALL) '.[page]' $@

$(VENV)/.installed-site: pyproject.toml
	$(INSTALL) '.[site]' $@

$(VENV)/.installed-test: pyproject.toml
	$(INSTALL) '.[test]' $@
