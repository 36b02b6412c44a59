// Google's fake Pub/Sub as a program: main ADDRESS. It ends with the signal that ends it.
package main

import (
	"fmt"
	"os"

	"cloud.google.com/go/pubsub/v2/pstest"
)

func main() {
	server := pstest.NewServerWithAddress(os.Args[1])
	fmt.Println("listening on", server.Addr)
	select {}
}
