"""The proof: what Caravan promises, tried through every crash, order and race that we could think of.

    make verify [PART=name] [SCALE=small|full] [SEED=n]

`parts` lists what there is to prove; each part is a module with `run(context)`. The frame gives them a PostgreSQL of
their own (`scratch`), a marketplace to work on (`world`), and writes down what they found (`report`). Faults are put in
from outside, by replacing what the product calls: the product has no switch for any of this.
"""
