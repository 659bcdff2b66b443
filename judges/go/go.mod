module mastio.invalid/judges/verify

go 1.19
