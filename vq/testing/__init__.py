"""What helps tests of code that uses vq.

* `plugin`: the fixtures of pytest, which are there without being imported
* `wiring`: a scripted driver in front of a device, over any transport; `transports` and
  `vhost_frontend` are what it stands on
* `hostile`: a battery of drivers that break rules, and what it takes to write more;
  `strategies`: the same at random, with hypothesis
* `guest`: Linux under User-Mode Linux and QEMU; `uml`: the same by hand; `served`: devices for it,
  and ``vq serve`` as a program; `testpmd`: DPDK
* `recordings`: recorded sessions as tests
* `namespaces`, `contained`, `requirements`: network stacks, programs that end with the test, and
  what happens where a machine lacks something
* `bsd_tap`: OpenBSD's and FreeBSD's taps, on Linux
"""
