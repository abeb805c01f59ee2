// Command chart renders the templates of a Helm chart as Helm does, as far as deploy/chart uses it: text/template, sprig,
// include, and an error for a missing value.
//
//	GO111MODULE=off GOPATH=/usr/share/gocode go run tools/chart.go FOLDER RELEASE < VALUES.json
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"text/template"

	"github.com/Masterminds/sprig"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 3 {
		log.Fatal("chart FOLDER RELEASE < VALUES.json")
	}
	var values map[string]any
	if err := json.NewDecoder(os.Stdin).Decode(&values); err != nil {
		log.Fatal(err)
	}
	known := map[string]any{"Values": values, "Release": map[string]any{"Name": os.Args[2]}}
	all := template.New("chart").Option("missingkey=error").Funcs(sprig.TxtFuncMap())
	all.Funcs(template.FuncMap{"include": func(name string, data any) (string, error) {
		var text bytes.Buffer
		err := all.ExecuteTemplate(&text, name, data)
		return text.String(), err
	}})
	files, err := filepath.Glob(filepath.Join(os.Args[1], "templates", "*"))
	if err != nil {
		log.Fatal(err)
	}
	template.Must(all.ParseFiles(files...))
	for _, file := range files {
		if filepath.Ext(file) == ".yaml" {
			fmt.Println("---")
			if err := all.ExecuteTemplate(os.Stdout, filepath.Base(file), known); err != nil {
				log.Fatal(err)
			}
		}
	}
}
