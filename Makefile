# Each target works on a fresh clone with nothing but Python 3.11 or newer: .venv is made first, and again when pyproject.toml changes.
.PHONY: demo test lab bench lint docs
BIN := .venv/bin
READY := .venv/.ready

demo: $(READY) # the quickstart, run without a browser
	$(BIN)/python tools/demo.py

test: $(READY) # everything, on the real servers
	-@$(BIN)/python -m broker_nb fetch kafka nats nats@2.9 pubsub servicebus pulsar
	@mkdir -p build
	BROKER_NB_CONFORMANCE=build/conformance.json $(BIN)/pytest -n 2 --dist loadgroup

lab: $(READY) # the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir notebooks

bench: $(READY) # ours against the raw client and against what people paste, as ratios
	$(BIN)/python benchmarks/read.py
	$(BIN)/python benchmarks/publish.py
	$(BIN)/python benchmarks/jetstream.py
	$(BIN)/python benchmarks/pubsub.py
	$(BIN)/python benchmarks/servicebus.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/test_repo.py tests/test_docs.py

docs: $(READY)
	$(BIN)/python tools/docs.py

$(READY): pyproject.toml
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then exec $$python -m venv .venv; fi; \
	done; echo 'no Python 3.11 or newer: install one, or name it with make PYTHON=/path/to/python3' >&2; exit 1
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[kafka,nats,pubsub,servicebus,pulsar,lab,test]'
	@touch $@
