PYTHON ?= python3
VENV ?= .venv
# A version to test with, such as transformers==5.9.0, or a checkout in $(VENV)/transformers; by default the newest.
TRANSFORMERS ?=
BIN = $(VENV)/bin

.PHONY: demo test test-fast test-oldest test-browser docs quality style clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[train]" $(TRANSFORMERS)
	touch $@

# Transformers' own model checks are in its sdist and its repository, not in the wheel.
$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[train,test,quality]"
	test -d "$(TRANSFORMERS)" || { \
		version=$$($(BIN)/python -c "import transformers; print(transformers.__version__)") && \
		$(BIN)/pip download --quiet --no-deps --no-binary :all: --dest $(VENV) "transformers==$$version" && \
		mkdir -p $(VENV)/transformers && \
		tar -xzf "$(VENV)/transformers-$$version.tar.gz" -C $(VENV)/transformers --strip-components 1; }
	touch $@

# Train, evaluate, save and classify on the bundled images.
demo: $(VENV)/.installed
	$(BIN)/tnt-hf train merge --output_dir runs/demo --overwrite_output_dir

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 TRANSFORMERS_TESTS=$(VENV)/transformers $(BIN)/python -m pytest -n auto

test-fast: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow and not browser"

# Tests whose outcome does not depend on the version of Transformers.
# real_bench reads a DINOv2 as the newest Transformers names it.
INDEPENDENT = real_bench app baselines command evaluation hub_files inference_benchmark labels model_card notebook package \
	readme results token_reduction token_trace visualization

# For an older Transformers, beside `make test` on the newest.
test-oldest: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 TRANSFORMERS_TESTS=$(VENV)/transformers $(BIN)/python -m pytest -n auto \
		$(INDEPENDENT:%=--ignore=tests/test_%.py)

# Needs Chromium on the PATH: apt-get install chromium
test-browser: $(VENV)/.installed-test
	@command -v chromium > /dev/null || \
		{ echo "Chromium is missing: the tests of the page need it on the PATH (apt-get install chromium)."; exit 1; }
	$(BIN)/pip install --quiet --editable ".[train,browser]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/test_app_in_browser.py

# The site, into site/. Broken links and references are errors.
docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

quality: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -f tnt_hf/app/*.pyi  # Gradio writes them beside the modules of components
	$(BIN)/mypy

style: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv* runs site build dist *.egg-info
