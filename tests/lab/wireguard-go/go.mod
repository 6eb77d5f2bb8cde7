module lab

go 1.26

require golang.zx2c4.com/wireguard v0.0.0-20250521234502-f333402bd9cb
