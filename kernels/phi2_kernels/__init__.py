"""The operations a Phi step spends its time in, each beside the plain formula it is checked against."""
