"""Which parties this process plays: all of them (`simulated`), or one, with the others in processes of their own.

`launch` starts the processes, `processes` watches over them, and `party` is what each of them does: it joins by
`greetings`, trains over a `remote_wire` and keeps `snapshots`. What carries the frames: `wiring`, `transports`,
`streams`, `hub`, `sealing`, `frame`. Start at `party`.
"""
