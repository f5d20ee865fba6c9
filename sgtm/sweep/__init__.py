"""Many runs from one file, compared in one table (docs/sweep.md).

`file` expands the file, `compare` refuses runs that cannot be compared, `state` reads a run directory,
`room` divides the machine, `schedule` trains, `table` and `figures` collect.
"""
