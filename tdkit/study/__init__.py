"""The study of the paper: how far can an approximation error be trusted?

Records say what is measured (``records``, ``recipe``); ``replay`` and ``units`` measure it;
``store`` keeps it; ``running`` drives them; ``correlation`` and ``analysis`` draw the conclusions,
and ``figures``, ``tables`` and ``page`` show them.
"""
