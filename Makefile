# Every target installs what it needs; `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help setup run test lint screens verify bench lock
BIN := .venv/bin
LOCK := $(BIN)/uv pip compile --quiet --no-header --generate-hashes --no-emit-index-url --python-version 3.11

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: ## install everything for developing into .venv
	@tools/env dev

run: ## the whole platform with demo data; ARGS="--port 8123 --data DIR" is handed on
	@tools/env run
	@exec $(BIN)/caravan up --demo $(ARGS)

test: ## the tests; ARGS="-k name" is handed on to pytest
	@tools/env dev
	@$(BIN)/pytest -n 2 --dist worksteal --ignore=tests/browser $(ARGS)

lint: ## ruff, basedpyright, import-linter, migration lint
	@tools/env dev
	@failed=; for check in "ruff check" "ruff format --check --quiet" basedpyright \
		"lint-imports --no-logo" "squawk src/caravan/db/migrations/*.sql"; do \
		echo "- $${check%% *}"; $(BIN)/$$check || failed="$$failed $${check%% *}"; \
	done; test -z "$$failed" || { echo "lint failed:$$failed"; exit 1; }

screens: ## the browser tests; writes build/screens/*.png
	@tools/env screens
	@$(BIN)/pytest tests/browser $(ARGS)

verify: ## the proof; PART=name SCALE=small|full SEED=n (all parts, small, 1); writes build/verify.json
	@tools/env dev
	@$(BIN)/python -m verify --part '$(or $(PART),all)' --scale '$(or $(SCALE),small)' --seed '$(or $(SEED),1)' $(ARGS)

bench: ## the benchmarks; PART=name SCALE=small|full SEED=n (all parts, small, 1); writes build/bench.json
	@tools/env bench
	@$(BIN)/python -m bench --part '$(or $(PART),all)' --scale '$(or $(SCALE),small)' --seed '$(or $(SEED),1)' $(ARGS)

lock: ## compile the requirement files anew, with hashes; ARGS="--upgrade" for newer versions
	@tools/env dev
	@cd requirements && ../$(LOCK) $(ARGS) run.in -o run.txt
	@cd requirements && ../$(LOCK) $(ARGS) -c run.txt dev.in -o dev.txt
	@cd requirements && ../$(LOCK) $(ARGS) -c dev.txt bench.in -o bench.txt
