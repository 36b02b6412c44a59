// The second judge of the stand-in: the vendor's Go client sends, receives, settles and dead-letters, and says what it saw as JSON.
package main

import (
	"context"
	"encoding/json"
	"os"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/messaging/azservicebus"
)

type seen map[string]any

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func bodies(messages []*azservicebus.ReceivedMessage) (found []string) {
	for _, message := range messages {
		found = append(found, string(message.Body))
	}
	return
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	client, queue, sessions, told := must(azservicebus.NewClientFromConnectionString(os.Args[1], nil)), os.Args[2], os.Args[3], seen{}
	sender := must(client.NewSender(queue, nil))
	batch := must(sender.NewMessageBatch(ctx, nil))
	for _, body := range []string{"complete", "abandon", "bury", "defer"} {
		message := &azservicebus.Message{Body: []byte(body), ApplicationProperties: map[string]any{"n": int64(7), "at": time.UnixMilli(1000).UTC()}}
		if err := batch.AddMessage(message, nil); err != nil {
			panic(err)
		}
	}
	if err := sender.SendMessageBatch(ctx, batch, nil); err != nil {
		panic(err)
	}
	receiver := must(client.NewReceiverForQueue(queue, nil))
	told["peeked"] = bodies(must(receiver.PeekMessages(ctx, 10, nil)))
	var taken []*azservicebus.ReceivedMessage
	for len(taken) < 4 {
		taken = append(taken, must(receiver.ReceiveMessages(ctx, 4-len(taken), nil))...)
	}
	told["taken"], told["properties"] = bodies(taken), taken[0].ApplicationProperties
	told["renewed"] = receiver.RenewMessageLock(ctx, taken[0], nil) == nil
	reason, text := "why", "because"
	told["settled"] = []bool{
		receiver.CompleteMessage(ctx, taken[0], nil) == nil,
		receiver.AbandonMessage(ctx, taken[1], nil) == nil,
		receiver.DeadLetterMessage(ctx, taken[2], &azservicebus.DeadLetterOptions{Reason: &reason, ErrorDescription: &text}) == nil,
		receiver.DeferMessage(ctx, taken[3], nil) == nil,
	}
	again := must(receiver.ReceiveMessages(ctx, 1, nil))[0]
	told["again"], told["count"] = string(again.Body), again.DeliveryCount
	deferred := must(receiver.ReceiveDeferredMessages(ctx, []int64{*taken[3].SequenceNumber}, nil))
	told["deferred"] = bodies(deferred)
	told["fetched"] = []bool{receiver.CompleteMessage(ctx, again, nil) == nil, receiver.CompleteMessage(ctx, deferred[0], nil) == nil}
	dead := must(client.NewReceiverForQueue(queue, &azservicebus.ReceiverOptions{SubQueue: azservicebus.SubQueueDeadLetter}))
	buried := must(dead.ReceiveMessages(ctx, 1, nil))[0]
	told["buried"] = []string{string(buried.Body), *buried.DeadLetterReason, *buried.DeadLetterErrorDescription}
	id := "A"
	if err := must(client.NewSender(sessions, nil)).SendMessage(ctx, &azservicebus.Message{Body: []byte("s"), SessionID: &id}, nil); err != nil {
		panic(err)
	}
	next := must(client.AcceptNextSessionForQueue(ctx, sessions, nil))
	told["session"] = []any{next.SessionID(), bodies(must(next.ReceiveMessages(ctx, 1, nil))), next.RenewSessionLock(ctx, nil) == nil}
	_, err := must(client.NewSender("nothing-there", nil)).NewMessageBatch(ctx, nil)
	told["missing"] = err != nil && strings.Contains(err.Error(), "amqp:not-found")
	if err := json.NewEncoder(os.Stdout).Encode(told); err != nil {
		panic(err)
	}
}
