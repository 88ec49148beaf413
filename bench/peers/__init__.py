"""What people would pick instead, doing the same work on the same PostgreSQL. One adapter each; `work` is what they
share, `race` runs them.

Each is set up as its own documentation says it is fastest without giving up durability; where that leaves a choice,
`WAYS` names the candidates, all are tried, and the best is the one that counts.
"""

from bench.parts import Context, Result


async def run(context: Context) -> Result:
    from bench.peers import part  # a station needs none of it

    return await part.run(context)
