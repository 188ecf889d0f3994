"""One failure mode a file: a frozen policy and a pure decision over observations."""
