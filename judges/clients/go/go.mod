module mastio.invalid/judges/client

go 1.19
