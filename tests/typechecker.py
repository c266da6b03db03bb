"""The checker of annotations that the tests lay over exactflow: beartype, with PEP 484's tower.

With the tower, `float` accepts an int and `complex` a float, as every static checker has it.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
