"""python -m opd.doctor recipe=NAME [section.key=value ...]: can this run work here?"""
