"""Configuration: from a recipe and overrides to one frozen RunConfig.

``sections`` has the fields and ``run`` the whole with its two halves; ``fields`` walks over all of them for the others;
``overrides`` puts dotted options onto a recipe's tables, ``refusal`` says in one line what is wrong, ``loading`` reads
recipes and resolves them, and reads and writes the resolved configuration; ``help`` serves `metafleet train --help`.
"""
